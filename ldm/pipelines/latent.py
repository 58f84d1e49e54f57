"""Latent diffusion: pictures by a conditioner, a denoiser in latent space, and a decoder (Rombach et al.
2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.catalog.cards import ModelCard
from ldm.conditioning.conditioner import Conditioner
from ldm.diffusion.constraints import keep_known
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import cfg, compose
from ldm.diffusion.interfaces import Denoised, DenoiseFn, OnStep
from ldm.diffusion.noise import initial_noise
from ldm.images.canvas import pad_to_multiple
from ldm.images.pixels import ImageInput, to_depth, to_pixels
from ldm.images.result import Images
from ldm.models.safety import SafetyChecker
from ldm.pipelines.call import Call, Grid, Rules, SizeCondition, all_hooks, progress_bar, settle, warn_unknown
from ldm.pipelines.conditions import Pair, Watcher, conditions, cut, drafted, expanded_pair
from ldm.pipelines.editing import Editing
from ldm.pipelines.painting import Painting
from ldm.pipelines.recipe import stamp
from ldm.pipelines.replayable import replayable
from ldm.pipelines.windows import Crop, windowed

Tell = Callable[[tuple[int, int]], Pair]  # a latent's size → conditions
Finish = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) as decoded → as they are given out
TASKS = {
    "inpaint": "inpaint",
    "inpaint-ldm": "inpaint",
    "depth": "depth_to_image",
    "image": "instruct",
    "lowres": "upscale",
    "lowres-noised": "upscale",
}


class LatentDiffusion(Painting, Editing, nn.Module):
    """A latent diffusion model, ready to sample: ``vae``, ``text``, ``denoiser`` (``.net``, ``.schedule``,
    ``.prediction``), ``latent_scale``, ``card``.

    ``text`` turns prompts (or classes) into conditions, and is None in an unconditional model. ``origin``:
    what a recipe says of the weights. ``safety``: what looks at every picture made; None, the default, for
    nothing. ``watchers``: what is told of every run (`ldm.trace`).
    """

    def __init__(
        self,
        *,
        vae: nn.Module,
        text: Conditioner | None,
        denoiser: Denoiser,
        latent_scale: float,
        card: ModelCard,
        origin: Mapping[str, Any] | None = None,
        safety: SafetyChecker | None = None,
    ) -> None:
        super().__init__()
        self.vae: Any = vae
        self.text: Any = text
        self.denoiser = denoiser
        self.latent_scale = latent_scale
        self.card = card
        self.origin = dict(origin or {})
        self.safety = safety
        self.watchers: list[Watcher] = []

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in; the sampler's state is float32."""
        return next(self.denoiser.parameters()).dtype

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the name of their part: "unet", "vae", and what the conditioner has."""
        return {
            "unet": self.denoiser.net,
            "vae": self.vae,
            **(self.text.networks() if self.text is not None else {}),
        }

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        n: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        convention: Rules | None = None,
        spacing: str | None = None,
        grid: Grid | None = None,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        sizes: SizeCondition | Mapping[str, Any] | None = None,
        latents: Tensor | None = None,
        progress: bool = True,
        on_step: OnStep | None = None,
        keep_steps: bool = False,
        **sampler_options: Any,
    ) -> Images:
        """Pictures of a prompt, or of several: ``n`` (default 1) of each.

        A prompt may have weights, "(red:1.3) apple", and blends, "a {cat|dog} face"
        (`ldm.conditioning.prompt`), and any length (`ldm.conditioning.reading`). ``negative``: what to turn
        from, one text for all, or one for each prompt or each picture. ``steps``, ``guidance``, ``sampler``,
        ``height`` and ``width``: None for what the card says. ``convention``: diffusers, compvis, sgm or k,
        whose grids, start and noise are followed in place of the card's. ``spacing``: another one of
        `TimeGrid.make`. ``grid`` replaces steps and spacing: one of one's own, or a list of falling
        timesteps. ``seed``: picture i has seed s + i, or a sequence with one for each. ``latents`` (B, C, h,
        w): standard normal noise to start from, in place of the seeds'. ``guidance`` 1 is the conditional
        model alone, 0 the unconditional; an empty prompt is unconditional too (except in models whose
        unconditional is not the empty text). ``sizes``: what SDXL is told of the picture's size.
        ``keep_steps``: whether the prediction of every step is decoded too (`Images.animate`). Decoded values
        outside [0, 1] are clamped.

        Raises ValueError for a size that the autoencoder cannot hold, no pictures or no steps, an unknown
        sampler or option, a model that takes something else than text. Warns with `UnknownWords` where a
        prompt has words the model has never seen.
        """
        call = self._settle(
            prompt,
            negative=negative,
            n=n,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            convention=convention,
            spacing=spacing,
            grid=grid,
            seed=seed,
            height=height,
            width=width,
            sizes=sizes,
            latents=latents,
            progress=progress,
            on_step=on_step,
            keep_steps=keep_steps,
            **sampler_options,
        )
        return self._sample("text_to_image", call)

    def class_to_image(self, label: int | Sequence[int], **options: Any) -> Images:
        """Pictures of a class, or of several, by number; options as in `text_to_image`. ValueError for a
        model without classes."""
        return self._sample("class_to_image", self._settle(label, **options))

    def unconditional(self, n: int = 1, **options: Any) -> Images:
        """``n`` pictures of a model that is conditioned on nothing; options as in `text_to_image`."""
        return self._sample("unconditional", self._settle("", n=n, **options))

    @replayable
    def image_to_image(
        self, prompt: str | Sequence[str], image: ImageInput, *, strength: float = 0.75, **options: Any
    ) -> Images:
        """Pictures of a prompt that begin from a picture (SDEdit, Meng et al. 2022); options as in
        `text_to_image`, the size is the picture's.

        ``image``: see `to_pixels`; one, or one for each picture. A size that does not fit the autoencoder is
        padded by repeating the last column and row, with a `Padded` warning, and the result cut back.
        ``strength`` in [0, 1]: the part of the grid that is run; 1 begins from pure noise, and the picture is
        not looked at; 0 gives its reconstruction. ``latents`` is the noise that is added.
        """
        pixels, call, finish = self._with_picture(prompt, image, options)
        return self._sample("image_to_image", call, given=pixels, strength=strength, finish=finish)

    @replayable
    def depth_to_image(
        self,
        prompt: str | Sequence[str],
        image: ImageInput,
        depth: ImageInput,
        *,
        strength: float = 0.8,
        **options: Any,
    ) -> Images:
        """`image_to_image` for a model that is also given a depth map, nearer being larger: (H, W) or (B, 1,
        H, W) in any unit and size."""
        self._needs("depth")
        pixels, call, finish = self._with_picture(prompt, image, options)
        factor = self.vae.config.factor
        small = to_depth(depth, (call.height // factor, call.width // factor)).to(self.device)
        return self._sample(
            "depth_to_image", call, given=pixels, strength=strength, extra={"concat": small}, finish=finish
        )

    @replayable
    def instruct(
        self, prompt: str | Sequence[str], image: ImageInput, *, image_guidance: float = 1.5, **options: Any
    ) -> Images:
        """A picture changed as a sentence asks (InstructPix2Pix, Brooks et al. 2023, eq. 3); options as in
        `text_to_image`.

        ``guidance`` weighs the sentence, ``image_guidance`` the picture.
        """
        self._needs("image")
        pixels, call, finish = self._with_picture(prompt, image, options)
        extra, about = {"concat": self.encode(pixels) / self.latent_scale}, {"image_guidance": image_guidance}
        return self._sample(
            "instruct", call, extra=extra, image_guidance=image_guidance, about=about, finish=finish
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] → scaled latents (B, C, H/f, W/f) float32: the posterior's mean."""
        x = (2 * x - 1).to(self.device, next(self.vae.parameters()).dtype)
        return cast(Tensor, self.vae.encode(x).mode().float() * self.latent_scale)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) → pictures (B, 3, H, W) float32 in [0, 1] on the CPU; values outside
        are clamped, NaN stays to be found."""
        x = self.vae.decode((z / self.latent_scale).to(next(self.vae.parameters()).dtype))
        return cast(Tensor, ((x.float() + 1) / 2).clamp(0, 1).cpu())

    # What all tasks share: options are settled, a state is noised, the sampler runs, and pictures come of the
    # latent.

    def _settle(self, prompt: Any, **options: Any) -> Call:
        call = settle(self.card, self.denoiser.schedule, prompt, **options)
        for side, value in (("height", call.height), ("width", call.width)):
            factor = self.vae.config.factor
            if value < factor or value % factor:
                near = max(factor, round(value / factor) * factor)
                raise ValueError(
                    f"{side} {value}: expected a multiple of {factor}, the autoencoder's factor; the nearest"
                    f" is {near}"
                )
        warn_unknown(self.card.name, self.text, (*call.prompts, *call.negatives), stacklevel=4)
        return call

    @property
    def multiple(self) -> int:
        """What the sides of a picture must be multiples of: the autoencoder's factor, and the UNet's where
        that cannot round."""
        net = self.denoiser.net.config
        return self.vae.config.factor * (net.factor if net.resample == "resblock" else 1)

    def _with_picture(
        self, prompt: Any, image: ImageInput, options: Mapping[str, Any]
    ) -> tuple[Tensor, Call, Finish]:
        """A picture (B or 1, 3, H, W), padded where its size does not fit, the call of that size, and what
        cuts the result back."""
        pixels = to_pixels(image)
        h, w = pixels.shape[-2:]
        return (
            *self._of_size(prompt, pad_to_multiple(pixels, self.multiple), options, (h, w)),
            lambda made: made[..., :h, :w],
        )

    def _of_size(
        self, prompt: Any, pixels: Tensor, options: Mapping[str, Any], frame: tuple[int, int]
    ) -> tuple[Tensor, Call]:
        """Pictures and the call of their size; ``frame``: the part of them that was given or is wanted, which
        messages speak of."""
        for name, side in zip(("height", "width"), frame, strict=True):
            if options.get(name) not in (None, side):
                raise ValueError(f"{name} {options[name]}: the picture has {side}; resize it first")
        call = self._settle(prompt, **{**options, "height": pixels.shape[-2], "width": pixels.shape[-1]})
        if len(pixels) not in (1, len(call.seeds)):
            raise ValueError(
                f"{len(pixels)} pictures for {len(call.seeds)} to be made: expected one, or one for each"
            )
        return pixels, call

    @torch.no_grad()
    def _sample(
        self,
        task: str,
        call: Call,
        *,
        given: Tensor | None = None,
        strength: float = 1.0,
        extra: Mapping[str, Tensor] | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        draft: tuple[Tensor, Tensor] | None = None,
        image_guidance: float | None = None,
        window: int | None = None,
        tell: Tell | None = None,
        finish: Finish | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Images:
        """The pictures of a call: from noise, or from ``given`` ones noised to where ``strength`` begins.

        ``known``: a latent, and a mask of what is to be made in it. ``finish``: what is done to the pictures
        at last. ``about``: what the recipe says besides. Others: see `_told`.
        """
        if self.card.concat is not None and "concat" not in (extra or {}):
            raise ValueError(
                f"{self.card.name!r} takes a picture beside the latent: call {TASKS[self.card.concat]}"
            )
        if not 0 <= strength <= 1:
            raise ValueError(f"strength: expected 0 to 1, got {strength}")
        for watcher in self.watchers:
            watcher.begin(call)
        facts = {**({} if given is None else {"strength": strength}), **(about or {})}
        if given is not None and strength == 0:
            z = self.encode(given)
            return self._images(task, call, z.expand(len(call.seeds), *z.shape[1:]), facts, finish)
        noise = self._noise(call)
        size = (noise.shape[-2], noise.shape[-1])
        told = self._conditions(call, size, extra=extra, draft=draft or known, window=window, tell=tell)
        z = None if given is None or strength == 1 else self.encode(given).expand(noise.shape)
        if z is None and known is not None and self._drafts(size) and not bool(known[1].all()):
            z, strength = cast(Tensor, told[0].concat).float(), DRAFTED
        rest, x = call.rules.begin(call.grid, noise, z, 1.0 if z is None else strength)
        call = call.over(rest)
        fn = self._seen(call, told, size, image_guidance=image_guidance, window=window)
        fn = fn if known is None else keep_known(fn, self.denoiser.schedule, *known)
        kept: list[Tensor] = []
        x = self._run(fn, x, call, *([lambda i, x, d: kept.append(d.x0)] if call.keep_steps else []))
        images = self._images(task, call, x, facts, finish)
        if kept:
            steps = [self.decode(x0) for x0 in kept]
            images = replace(
                images, steps=torch.stack(steps if finish is None else [finish(step) for step in steps])
            )
        for watcher in self.watchers:
            watcher.end(images)
        return images

    def _run(
        self, fn: DenoiseFn, x: Tensor, call: Call, *looks: Callable[[int, Tensor, Denoised], Any]
    ) -> Tensor:
        """The call's sampler over its grid, from a first state; ``looks`` are shown each step."""
        with progress_bar(len(call.grid), call.progress) as bar:
            hook = all_hooks(
                call.on_step, lambda *_: bar.update(), *looks, *(watcher.step for watcher in self.watchers)
            )
            draw = call.rules.noise(call.seeds, call.grid, call.sampler, **call.options)
            return call.solve(fn, x, call.grid, noise=draw, on_step=hook, **call.options)

    def _drafts(self, size: tuple[int, int]) -> bool:
        """Whether the model drafts latents of a size (h, w) whole."""
        draft = getattr(self.text, "draft", None)
        return draft is not None and self.card.concat is None and size == (draft.config.size,) * 2

    def _told(
        self, call: Call, size: tuple[int, int], *, draft: tuple[Tensor, Tensor] | None = None
    ) -> DenoiseFn:
        """The guided denoiser of a latent of a size (h, w): see `_conditions`."""
        return self._seen(call, self._conditions(call, size, draft=draft), size)

    def _conditions(
        self,
        call: Call,
        size: tuple[int, int],
        *,
        extra: Mapping[str, Tensor] | None = None,
        draft: tuple[Tensor, Tensor] | None = None,
        window: int | None = None,
        tell: Tell | None = None,
    ) -> Pair:
        """What the network is told where the latent has a size (h, w), of which watchers hear.

        ``extra`` joins the conditions, which ``tell`` makes of a size (None: those of the call's prompts).
        ``draft``: a latent, and a mask of where the text's own draft is kept. ``window``: the side, in
        pixels, of what the network sees at a time, None for all.
        """
        factor = self.vae.config.factor
        if window is not None and window < factor:
            raise ValueError(f"window: expected a side of at least {factor} pixels, got {window}")
        tile = self._tile(size, window)
        inner = (min(size[0], tile), min(size[1], tile))
        told = conditions(self.card, self.text, call, inner) if tell is None else tell(inner)
        told = expanded_pair(
            told, len(call.seeds), **{name: value.to(self.device) for name, value in (extra or {}).items()}
        )
        if draft is not None and self.card.concat is None:
            told = drafted(
                told, *(value.to(self.device) for value in draft), getattr(self.text, "draft", None)
            )

        for watcher in self.watchers:
            watcher.told(told)
        return told

    def _tile(self, size: tuple[int, int], window: int | None) -> int:
        """The side of what the network sees at a time of a latent (h, w)."""
        return max(size) if window is None else window // self.vae.config.factor

    def _seen(
        self,
        call: Call,
        told: Pair,
        size: tuple[int, int],
        *,
        image_guidance: float | None = None,
        window: int | None = None,
    ) -> DenoiseFn:
        """The guided denoiser of a latent of a size (h, w) under conditions, whole or in windows."""
        tile = self._tile(size, window)

        def make(part: Crop) -> DenoiseFn:
            return self._guided(call, (cut(told[0], part, size), cut(told[1], part, size)), image_guidance)

        whole = (..., slice(None), slice(None))
        return make(whole) if tile >= max(size) else windowed(make, tile, overlap=tile // 2)

    def _noise(self, call: Call) -> Tensor:
        """Standard normal noise for each picture, float32 on the device: the caller's or the seeds'."""
        factor, channels = self.vae.config.factor, self.vae.config.latent_channels
        shape = (channels, call.height // factor, call.width // factor)
        latents = call.latents
        if latents is None:
            latents = initial_noise(call.seeds, shape)
        elif latents.shape != (len(call.seeds), *shape):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected {(len(call.seeds), *shape)}"
            )
        return latents.to(self.device, torch.float32)

    def _guided(self, call: Call, pair: Pair, image_guidance: float | None) -> DenoiseFn:
        """The denoiser under guidance, in the way that the model takes it."""
        cond, uncond = pair
        denoiser = self._as_seen(call)
        if (
            self.denoiser.net.config.guidance_dim is not None
        ):  # latent consistency models: the scale is an input
            return denoiser.bind(
                replace(cond, guidance=torch.full((len(call.seeds),), call.guidance, device=self.device))
            )
        if image_guidance is None:
            return cfg(denoiser, cond, uncond, call.guidance)
        assert uncond.concat is not None
        nothing = replace(uncond, concat=torch.zeros_like(uncond.concat))
        # e(0) + s_I·(e(image) − e(0)) + s_T·(e(image, text) − e(image)), gathered by condition
        return compose(denoiser, [(cond, call.guidance), (uncond, image_guidance - call.guidance)], nothing)

    def _as_seen(self, call: Call) -> Denoiser:
        """The denoiser as the call's convention has its network see t."""
        own = self.denoiser
        if own.quantize or not call.rules.quantize:
            return own
        return Denoiser(own.net, own.schedule, own.prediction, learned_var=own.learned_var, quantize=True)

    def _images(
        self, task: str, call: Call, z: Tensor, facts: Mapping[str, Any], finish: Finish | None = None
    ) -> Images:
        """The pictures of a latent (B, C, h, w), with their recipe; flagged, and blackened if asked, where
        there is a safety checker."""
        pixels, flagged = self.decode(z), None
        if finish is not None:
            pixels = finish(pixels)
        if self.safety is not None:
            flagged = self.safety(pixels)
            pixels = self.safety.hide(pixels, flagged)
        recipe = self._recipe(
            {**call.recipe(task), **facts}, replayable=call.replayable and task in REPLAYABLE
        )
        return Images(
            tensor=pixels,
            seeds=call.seeds,
            prompts=tuple(map(str, call.prompts)),
            recipe=recipe,
            flagged=flagged,
        )

    def _needs(self, *kinds: str) -> None:
        if self.card.concat not in kinds:
            fitting = TASKS.get(self.card.concat or "", "text_to_image")
            raise ValueError(
                f"{self.card.name!r} has no input channels for this task; what it does: {fitting}"
            )

    def _recipe(self, task: Mapping[str, Any], *, replayable: bool) -> dict[str, Any]:
        return stamp(
            self.card.name,
            task,
            device=self.device,
            dtype=self.dtype,
            origin=self.origin,
            replayable=replayable,
        )


# of the grid is run where a hole begins from its draft, which agrees with what is known: more forgets it,
# less leaves it blurred
DRAFTED = 0.5
# of whose arguments the recipe says all; others: `replayable`
REPLAYABLE = ("text_to_image", "class_to_image", "unconditional")
