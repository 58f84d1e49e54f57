"""Latent diffusion: pictures by a conditioner, a denoiser in latent space, and a decoder (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.cards import ModelCard
from ldm.denoiser import Denoiser
from ldm.guidance import cfg, compose, keep_known
from ldm.images import Images
from ldm.models.conditioner import Conditioner
from ldm.models.safety import SafetyChecker
from ldm.noise import initial_noise, keyed_normal
from ldm.pipelines.call import Call, Grid, Rules, SizeCondition, all_hooks, progress_bar, settle, warn_unknown
from ldm.pipelines.conditions import Pair, Watcher, conditions, joined
from ldm.pipelines.pixels import Picture, to_depth, to_mask, to_pixels
from ldm.pipelines.recipe import stamp
from ldm.types import DenoiseFn, OnStep

LOW_NOISE = 2**62  # the keyed draw that noises an upscaler's input: none that a sampler makes
TASKS = {
    "inpaint": "inpaint", "inpaint-ldm": "inpaint", "depth": "depth_to_image", "image": "instruct", "lowres": "upscale", "lowres-noised": "upscale",
}  # fmt: skip


class LatentDiffusion(nn.Module):
    """A latent diffusion model, ready to sample: ``vae``, ``text``, ``denoiser`` (``.net``, ``.schedule``, ``.prediction``), ``latent_scale``,
    ``card``.

    ``text`` turns prompts (or classes) into conditions, and is None in an unconditional model. ``origin``: what a recipe says of the weights.
    ``safety``: what looks at every picture made; None, the default, for nothing. ``watchers``: what is told of every run (`ldm.trace`).
    """

    def __init__(
        self, *, vae: nn.Module, text: Conditioner | None, denoiser: Denoiser, latent_scale: float, card: ModelCard,
        origin: Mapping[str, Any] | None = None, safety: SafetyChecker | None = None,
    ) -> None:  # fmt: skip
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
        return {"unet": self.denoiser.net, "vae": self.vae, **(self.text.networks() if self.text is not None else {})}

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str = "",
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
        **sampler_options: Any,
    ) -> Images:
        """Pictures of a prompt, or of several: ``n`` (default 1) of each.

        ``steps``, ``guidance``, ``sampler``, ``height`` and ``width``: None for what the card says. ``convention``: diffusers, compvis, sgm or
        k, whose grids, start and noise are followed in place of the card's. ``spacing``: another one of `TimeGrid.make`. ``grid`` replaces
        steps and spacing: one of one's own, or a list of falling timesteps. ``seed``: picture i has seed s + i, or a sequence with one for
        each. ``latents`` (B, C, h, w): standard normal noise to start from, in place of the seeds'. ``guidance`` 1 is the conditional model
        alone, 0 the unconditional; an empty prompt is unconditional too (except in models whose unconditional is not the empty text).
        ``sizes``: what SDXL is told of the picture's size.
        Decoded values outside [0, 1] are clamped.

        Raises ValueError for a size that the autoencoder cannot hold, no pictures or no steps, an unknown sampler or option, a model that
        takes something else than text. Warns with `UnknownWords` where a prompt has words the model has never seen.
        """
        call = self._settle(
            prompt, negative=negative, n=n, steps=steps, guidance=guidance, sampler=sampler, convention=convention, spacing=spacing, grid=grid,
            seed=seed, height=height, width=width, sizes=sizes, latents=latents, progress=progress, on_step=on_step, **sampler_options,
        )  # fmt: skip
        return self._sample("text_to_image", call)

    def class_to_image(self, label: int | Sequence[int], **options: Any) -> Images:
        """Pictures of a class, or of several, by number; options as in `text_to_image`. ValueError for a model without classes."""
        return self._sample("class_to_image", self._settle(label, **options))

    def unconditional(self, n: int = 1, **options: Any) -> Images:
        """``n`` pictures of a model that is conditioned on nothing; options as in `text_to_image`."""
        return self._sample("unconditional", self._settle("", n=n, **options))

    def image_to_image(self, prompt: str | Sequence[str], image: Picture, *, strength: float = 0.75, **options: Any) -> Images:
        """Pictures of a prompt that begin from a picture (SDEdit, Meng et al. 2022); options as in `text_to_image`, the size is the picture's.

        ``image``: see `to_pixels`; one, or one for each picture. ``strength`` in [0, 1]: the part of the grid that is run; 1 begins from pure
        noise, and the picture is not looked at; 0 gives its reconstruction. ``latents`` is the noise that is added.
        """
        pixels, call = self._with_picture(prompt, image, options)
        return self._sample("image_to_image", call, given=pixels, strength=strength)

    def inpaint(self, prompt: str | Sequence[str], image: Picture, mask: Picture, *, strength: float = 1.0, **options: Any) -> Images:
        """Pictures in which the masked part is made anew; options as in `text_to_image`, the size is the picture's.

        ``mask``: white (1) where to repaint, of the picture's size, cut at one half. A model with input channels for mask and picture is given
        both; any other keeps the known part of the latent as it is (`keep_known`), a latent position being repainted if any of its pixels is.
        Outside the mask, the picture is its reconstruction by the autoencoder. ``strength``: as in `image_to_image`.
        """
        pixels, call = self._with_picture(prompt, image, options)
        hole = to_mask(mask, pixels.shape[-2:])
        if self.card.concat in ("inpaint", "inpaint-ldm"):
            extra = {"concat": self._masked(pixels, hole)}
            return self._sample("inpaint", call, given=pixels, strength=strength, extra=extra)
        known = self.encode(pixels)
        small = F.adaptive_max_pool2d(hole, known.shape[-2:])

        def wrap(fn: DenoiseFn) -> DenoiseFn:
            return keep_known(fn, self.denoiser.schedule, known, small)

        return self._sample("inpaint", call, given=pixels, strength=strength, wrap=wrap)

    def depth_to_image(self, prompt: str | Sequence[str], image: Picture, depth: Picture, *, strength: float = 0.8, **options: Any) -> Images:
        """`image_to_image` for a model that is also given a depth map, nearer being larger: (H, W) or (B, 1, H, W) in any unit and size."""
        self._needs("depth")
        pixels, call = self._with_picture(prompt, image, options)
        factor = self.vae.config.factor
        small = to_depth(depth, (call.height // factor, call.width // factor)).to(self.device)
        return self._sample("depth_to_image", call, given=pixels, strength=strength, extra={"concat": small})

    def upscale(self, image: Picture, prompt: str | Sequence[str] = "", *, noise_level: int = 20, **options: Any) -> Images:
        """A picture enlarged by the autoencoder's factor (4), by a model that is given it; options as in `text_to_image`.

        ``noise_level``: the timestep that the picture is first noised to, 0 to 349 (of models that are told it; others get the picture itself).
        """
        self._needs("lowres", "lowres-noised")
        low = 2 * to_pixels(image).to(self.device) - 1
        factor = self.vae.config.factor
        call = self._settle(prompt, **{**options, "height": factor * low.shape[-2], "width": factor * low.shape[-1]})
        extra: dict[str, Tensor] = {"concat": low}
        if self.card.concat == "lowres-noised":
            if not 0 <= noise_level < 350:
                raise ValueError(f"noise_level: expected 0 to 349, got {noise_level}")
            noise = torch.stack([keyed_normal(seed, LOW_NOISE, low.shape[1:]) for seed in call.seeds]).to(self.device)
            low = low.expand(len(call.seeds), -1, -1, -1)
            extra = {"concat": self.denoiser.schedule.add_noise(low, noise_level, noise), "pooled": torch.full((len(low),), noise_level)}
        return self._sample("upscale", call, extra=extra, about={"noise_level": noise_level})

    def instruct(self, prompt: str | Sequence[str], image: Picture, *, image_guidance: float = 1.5, **options: Any) -> Images:
        """A picture changed as a sentence asks (InstructPix2Pix, Brooks et al. 2023, eq. 3); options as in `text_to_image`.

        ``guidance`` weighs the sentence, ``image_guidance`` the picture.
        """
        self._needs("image")
        pixels, call = self._with_picture(prompt, image, options)
        z = self.encode(pixels) / self.latent_scale
        return self._sample("instruct", call, extra={"concat": z}, image_guidance=image_guidance, about={"image_guidance": image_guidance})

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] → scaled latents (B, C, H/f, W/f) float32: the posterior's mean."""
        x = (2 * x - 1).to(self.device, next(self.vae.parameters()).dtype)
        return cast(Tensor, self.vae.encode(x).mode().float() * self.latent_scale)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) → pictures (B, 3, H, W) float32 in [0, 1] on the CPU; values outside are clamped, NaN stays to be found."""
        x = self.vae.decode((z / self.latent_scale).to(next(self.vae.parameters()).dtype))
        return cast(Tensor, ((x.float() + 1) / 2).clamp(0, 1).cpu())

    # What all tasks share: options are settled, a state is noised, the sampler runs, and pictures come of the latent.

    def _settle(self, prompt: Any, **options: Any) -> Call:
        call = settle(self.card, self.denoiser.schedule, prompt, **options)
        for side, value in (("height", call.height), ("width", call.width)):
            factor = self.vae.config.factor
            if value < factor or value % factor:
                near = max(factor, round(value / factor) * factor)
                raise ValueError(f"{side} {value}: expected a multiple of {factor}, the autoencoder's factor; the nearest is {near}")
        warn_unknown(self.card.name, self.text, (*call.prompts, call.negative), stacklevel=4)
        return call

    def _with_picture(self, prompt: Any, image: Picture, options: Mapping[str, Any]) -> tuple[Tensor, Call]:
        """A picture (B or 1, 3, H, W) and the call of its size."""
        pixels = to_pixels(image)
        for name, side in (("height", pixels.shape[-2]), ("width", pixels.shape[-1])):
            if options.get(name) not in (None, side):
                raise ValueError(f"{name} {options[name]}: the picture has {side}; resize it first")
        call = self._settle(prompt, **{**options, "height": pixels.shape[-2], "width": pixels.shape[-1]})
        if len(pixels) not in (1, len(call.seeds)):
            raise ValueError(f"{len(pixels)} pictures for {len(call.seeds)} to be made: expected one, or one for each")
        return pixels, call

    @torch.no_grad()
    def _sample(
        self, task: str, call: Call, *, given: Tensor | None = None, strength: float = 1.0, extra: Mapping[str, Tensor] | None = None,
        wrap: Callable[[DenoiseFn], DenoiseFn] | None = None, image_guidance: float | None = None, about: Mapping[str, Any] | None = None,
    ) -> Images:  # fmt: skip
        """The pictures of a call: from noise, or from ``given`` ones noised to where ``strength`` begins; ``extra`` joins the conditions."""
        if self.card.concat is not None and "concat" not in (extra or {}):
            raise ValueError(f"{self.card.name!r} takes a picture beside the latent: call {TASKS[self.card.concat]}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength: expected 0 to 1, got {strength}")
        for watcher in self.watchers:
            watcher.begin(call)
        facts = {**({} if given is None else {"strength": strength}), **(about or {})}
        if given is not None and strength == 0:
            z = self.encode(given)
            return self._images(task, call, z.expand(len(call.seeds), *z.shape[1:]), facts)
        noise = self._noise(call)
        z = None if given is None or strength == 1 else self.encode(given).expand(noise.shape)
        rest, x = call.rules.begin(call.grid, noise, z, 1.0 if z is None else strength)
        call = call.over(rest)
        told = conditions(self.card, self.text, call, (x.shape[-2], x.shape[-1]))
        pair = joined(told, len(x), **{k: v.to(self.device) for k, v in (extra or {}).items()})
        fn = self._guided(call, pair, image_guidance)
        for watcher in self.watchers:
            watcher.told(pair)
        with progress_bar(len(call.grid), call.progress) as bar:
            hook = all_hooks(call.on_step, lambda *_: bar.update(), *(watcher.step for watcher in self.watchers))
            draw = call.rules.noise(call.seeds, call.grid, call.sampler, **call.options)
            x = call.solve(fn if wrap is None else wrap(fn), x, call.grid, noise=draw, on_step=hook, **call.options)
        images = self._images(task, call, x, facts)
        for watcher in self.watchers:
            watcher.end(images)
        return images

    def _noise(self, call: Call) -> Tensor:
        """Standard normal noise for each picture, float32 on the device: the caller's or the seeds'."""
        factor, channels = self.vae.config.factor, self.vae.config.latent_channels
        shape = (channels, call.height // factor, call.width // factor)
        latents = call.latents
        if latents is None:
            latents = initial_noise(call.seeds, shape)
        elif latents.shape != (len(call.seeds), *shape):
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {(len(call.seeds), *shape)}")
        return latents.to(self.device, torch.float32)

    def _guided(self, call: Call, pair: Pair, image_guidance: float | None) -> DenoiseFn:
        """The denoiser under guidance, in the way that the model takes it."""
        cond, uncond = pair
        denoiser = self._as_seen(call)
        if self.denoiser.net.config.guidance_dim is not None:  # latent consistency models: the scale is an input
            return denoiser.bind(replace(cond, guidance=torch.full((len(call.seeds),), call.guidance, device=self.device)))
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

    def _masked(self, pixels: Tensor, hole: Tensor) -> Tensor:
        """The channels of an inpainting model: mask and latent of the picture with a hole, grey (0 in [−1, 1]), or black in LDM's own."""
        ldm_own = self.card.concat == "inpaint-ldm"
        z = self.encode(pixels * (1 - hole) + hole * (0.0 if ldm_own else 0.5))
        small = F.interpolate(hole, z.shape[-2:]).to(z.device).expand(len(z), -1, -1, -1)  # nearest
        return torch.cat([z, 2 * small - 1], dim=1) if ldm_own else torch.cat([small, z], dim=1)

    def _images(self, task: str, call: Call, z: Tensor, facts: Mapping[str, Any]) -> Images:
        """The pictures of a latent (B, C, h, w), with their recipe; flagged, and blackened if asked, where there is a safety checker."""
        pixels, flagged = self.decode(z), None
        if self.safety is not None:
            flagged = self.safety(pixels)
            pixels = self.safety.hide(pixels, flagged)
        recipe = self._recipe({**call.recipe(task), **facts}, replayable=call.replayable and task in REPLAYABLE)
        return Images(tensor=pixels, seeds=call.seeds, prompts=tuple(map(str, call.prompts)), recipe=recipe, flagged=flagged)

    def _needs(self, *kinds: str) -> None:
        if self.card.concat not in kinds:
            fitting = TASKS.get(self.card.concat or "", "text_to_image")
            raise ValueError(f"{self.card.name!r} has no input channels for this task; what it does: {fitting}")

    def _recipe(self, task: Mapping[str, Any], *, replayable: bool) -> dict[str, Any]:
        return stamp(self.card.name, task, device=self.device, dtype=self.dtype, origin=self.origin, replayable=replayable)


REPLAYABLE = ("text_to_image", "class_to_image", "unconditional")  # a recipe does not hold pictures
