"""Latent diffusion (Rombach et al. 2022): one stage in latent space, and a conditioner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.cards import ModelCard
from ldm.conditioning.conditioner import Conditioner, TextConditioner, TwoTowers
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.interfaces import OnStep
from ldm.images.canvas import pad_to_multiple
from ldm.images.result import Images
from ldm.models.safety import SafetyChecker
from ldm.pipelines.base import BasePipeline
from ldm.pipelines.call import Call, Grid, Rules, SizeCondition, named_options
from ldm.pipelines.checks import check_unit_interval, warn_unknown_words
from ldm.pipelines.conditions import Pair, expanded_pair, prompt_conditions
from ldm.pipelines.control.control_use import Controlling, as_controls
from ldm.pipelines.control.controls import Controls, controlled_pair
from ldm.pipelines.control.hinted_layouts import hinted_conditions
from ldm.pipelines.drafts import with_known_draft
from ldm.pipelines.layouts import fitted_conditions, known_of
from ldm.pipelines.protocol import Begun, Known, Request
from ldm.pipelines.replayable import replayable
from ldm.pipelines.stages.space import Space
from ldm.pipelines.stages.stage import CONCAT_TASKS, Stage
from ldm.pipelines.tasks.deferred import defer
from ldm.pipelines.tasks.edit import edit
from ldm.pipelines.tasks.image_to_image import depth_to_image, image_to_image
from ldm.pipelines.tasks.instruct import instruct
from ldm.pipelines.tasks.interpolate import interpolate
from ldm.pipelines.tasks.reconstruct import reconstruct
from ldm.pipelines.tasks.upscale import upscale
from ldm.pipelines.tasks.variations import variations
from ldm.support.calls import in_separate_call

# Part of the grid that is run where a hole starts from its draft, which agrees with the known part: more
# forgets the draft, less leaves it blurred.
DRAFTED = 0.5


class LatentDiffusion(BasePipeline):
    """A latent diffusion model, ready to sample.

    Args:
        vae: The autoencoder.
        text: Turns prompts (or classes) into conditions; None in an unconditional model.
        denoiser: The UNet, its schedule and what it predicts.
        latent_scale: Factor by which encoded latents are multiplied.
        card: The model's card.
        origin: Hashes of the weights, for recipes.
        safety: Safety checker, applied to all images. Default: no check.
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
        super().__init__(origin=origin, safety=safety, text=text)
        self.vae: Any = vae  # an autoencoder of any kind: encode, decode, config
        self.text: Any = text  # a conditioner of any kind, or None
        self.denoiser = denoiser
        self.latent_scale = latent_scale
        self.card = card
        self._controls: Controls | None = None

    @property
    def name(self) -> str:
        """Name of the model, from its card."""
        return self.card.name

    @property
    def stage(self) -> Stage:
        """The diffusion in latent space."""
        space = Space(self.vae, self.latent_scale, self.card.latent_mean, self.card.latent_std)
        helper = self.adapters.helper
        return Stage(
            denoiser=self.denoiser,
            card=self.card if helper is None else helper.applied(self.card),
            space=space,
            name=self.name,
            concat=self.card.concat,
            guide=self.guide,
        )

    @property
    def controls(self) -> Controls:
        """The networks that control the UNet by an image: load, list, remove (docs/control.md)."""
        if self._controls is None:
            self._controls = Controls(self.networks, self.name, self._check_weights)
        return self._controls

    def _check_weights(self) -> None:
        """Raise ValueError if adapters are merged into the weights."""
        self.adapters.check_saved()

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks by part: "unet", "vae", and those of the conditioner."""
        conditioner = {} if self.text is None else self.text.networks()
        return {"unet": self.denoiser.net, "vae": self.vae, **conditioner}

    def readers(self) -> dict[str, TextConditioner]:
        """Return what reads prompts with learned words, by the part of its text tower."""
        return self.text.readers() if isinstance(self.text, TextConditioner | TwoTowers) else {}

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
        seed: int | Sequence[int] | None = 0,
        height: int | None = None,
        width: int | None = None,
        sizes: SizeCondition | Mapping[str, Any] | None = None,
        latents: Tensor | None = None,
        progress: bool = True,
        on_step: OnStep | None = None,
        keep_steps: bool = False,
        controls: Controlling | None = None,
        **sampler_options: Any,
    ) -> Images:
        """Draw images of a prompt, or of several.

        Args:
            prompt: One prompt or several, long or short, with weights, "(red:1.3) apple", and blends,
                "a {cat|dog} face" (`ldm.conditioning.prompt`).
            negative: What to guide away from: one text for all images, or one for each prompt or each image.
            n: Number of images of each prompt. Default: 1.
            steps: Sampling steps. Default: the card's.
            guidance: Guidance scale; 1 is the conditional model, 0 the unconditional one. Default: the
                card's.
            sampler: Name in `ldm.SAMPLERS`. Default: the card's.
            convention: Program whose grids, first state and noise are followed: "diffusers", "compvis", "sgm"
                or "k", or a `Convention`. Default: the card's.
            spacing: Spacing of `TimeGrid.make` in place of the convention's.
            grid: A `TimeGrid`, or a list of falling timesteps, in place of steps and spacing.
            seed: Image i has seed `seed` + i; or one seed for each image; None: random ones.
            height, width: Size in pixels, multiples of the autoencoder's factor. Default: the card's.
            sizes: SDXL's size conditions.
            latents: Standard normal noise (B, C, h, w) in place of the seeds'.
            progress: Whether to show a progress bar, on a terminal.
            on_step: Called after every step as (i, x, denoised); may return a state, or raise StopIteration.
            keep_steps: Whether to decode the prediction of every step too, for `Images.animate`.
            controls: Uses of what `pipe.controls` holds, each an `ldm.Control` (docs/control.md).
            sampler_options: Options of the sampler, such as `eta` of ddim.

        Returns:
            Images in [0, 1], with seeds and recipe. Decoded values outside [0, 1] are clamped.

        Raises:
            ValueError: If an option is unknown or does not fit the model; the message names the choices.

        Warns:
            UnknownWords: If a prompt has words that the model has never seen.
        """
        options = named_options(locals())
        call = self.settle(prompt, **options, **sampler_options)
        return self.draw(call, Request(task="text_to_image"))

    def class_to_image(self, label: int | Sequence[int], **options: Any) -> Images:
        """Draw images of a class, or of several, by number.

        Args:
            label: Class number or numbers.
            options: Options of `text_to_image`.

        Raises:
            ValueError: If the model has no classes, or the number is not one of them.
        """
        return self.draw(self.settle(label, **options), Request(task="class_to_image"))

    def unconditional(self, n: int = 1, **options: Any) -> Images:
        """Draw `n` images with a model that is not conditioned; the options are those of `text_to_image`."""
        return self.draw(self.settle("", n=n, **options), Request(task="unconditional"))

    image_to_image = replayable(image_to_image)
    depth_to_image = replayable(depth_to_image)
    instruct = replayable(instruct)
    variations = replayable(variations)
    interpolate = replayable(interpolate)
    edit = replayable(edit)
    reconstruct = replayable(reconstruct)
    upscale = replayable(upscale)

    def encode(self, x: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] as scaled latents (B, C, H/f, W/f): posterior means."""
        return self.stage.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W), float32 in [0, 1] on the CPU.

        Values outside [0, 1] are clamped.
        """
        return self.stage.images.decode(z)

    def settle(self, prompt: Any, **options: Any) -> Call:
        """Settle the options of a call (see `text_to_image`), check them, and warn of unknown words."""
        wanted = as_controls(options.pop("controls", None))
        call = self.stage.settle(prompt, **options)
        self.stage.check_shape(call)
        if wanted:
            call = self.controls.settled(wanted, call, self.stage.shape(call)[1:], self.multiple)
        warn_unknown_words(self.name, self.text, (*call.prompts, *call.negatives))
        return call

    def conditions(self, call: Call, size: tuple[int, int], *, both: bool = True) -> Pair:
        """Return the conditions of a call's prompts, for latents of size (h, w); see `prompt_conditions`."""
        return prompt_conditions(self.card, self.text, call, size, both=both)

    def paired(self, call: Call, request: Request) -> Pair:
        """Return the conditions of a request, for each image of the call; watchers are shown them."""
        stage = self.stage
        size = stage.shape(call)[1:]
        tile = stage.tile(size, request.window)
        shows = isinstance(self.text, ExemplarConditioner)  # on a canvas that covers the whole state
        inner = size if shows else (min(size[0], tile), min(size[1], tile))
        both = any(call.negatives) or stage.evaluates_both(call, request.image_guidance)
        pair = self.conditions(call, inner, both=both) if request.pair is None else request.pair(inner)
        if shows and request.pair is None:
            pair = (self._fitted(call, request, size) or pair[0], pair[1])
        extra = {name: value.to(self.device) for name, value in request.extra.items()}
        pair = expanded_pair(pair, len(call.seeds), **extra)
        draft = request.draft or request.known
        if draft is not None and stage.concat is None:
            latent, hole = (value.to(self.device) for value in draft)
            pair = with_known_draft(pair, latent, hole, getattr(self.text, "draft", None))
        pair = controlled_pair(pair, call, self.device, self.dtype)
        for watcher in self.watchers:
            watcher.conditioned(pair)
        return pair

    def _fitted(self, call: Call, request: Request, size: tuple[int, int]) -> Cond | None:
        """Return the condition of exemplars in layouts that fit what a request knows of the images.

        Where it knows nothing, they fit the hints of edges of the call's controls, if there are some; else it
        is None. Without a prompt, the image of a draft is shown as it is.
        """
        known = known_of(request, self.encode)
        if known is None:
            return hinted_conditions(self.text, call, size)
        if request.draft is not None and not any(call.texts):
            return self.text.shown(self.decode(known.latent)).expand(len(call.seeds))
        return fitted_conditions(self.text, self.denoiser, call, known)

    @in_separate_call
    @torch.no_grad()
    def draw(self, call: Call, request: Request) -> Images:
        """Draw the images of a call: condition, sample, decode.

        Args:
            call: The settled options.
            request: What the task asks for besides.

        Raises:
            ValueError: If the model takes channels beside the latent and the task gives none.
        """
        defer(call, request)
        stage = self.stage
        self._check_request(request)
        for watcher in self.watchers:
            watcher.begin(call)
        if request.given is not None and request.strength == 0:
            z = stage.encode(request.given)
            return self.complete(call, self.decode(z.expand(len(call.seeds), *z.shape[1:])), request)
        begun = self.begin(call, request)
        kept: list[Tensor] = []
        hooks = [lambda i, x, d: kept.append(d.x0)] if call.keep_steps else []
        x = stage.sample(
            begun.over,
            begun.x,
            begun.pair,
            known=request.known,
            window=request.window,
            image_guidance=request.image_guidance,
            hooks=[*hooks, *self.hooks],
        )
        images = self.complete(begun.call, self.decode(x), request, kept)
        for watcher in self.watchers:
            watcher.end(images)
        return images

    def begin(self, call: Call, request: Request) -> Begun:
        """Return a drawing with its conditions and its first state; the arguments and errors are `draw`'s."""
        self._check_request(request)
        pair = self.paired(call, request)
        start, strength = self._start(call, request, pair)
        over, x = self.stage.begin(call, start=start, strength=strength)
        return Begun(call=over, over=over, pair=pair, x=x)

    def _check_request(self, request: Request) -> None:
        """Raise ValueError for a request that the model does not take."""
        if self.stage.concat is not None and "concat" not in request.extra:
            task = CONCAT_TASKS[self.stage.concat]
            raise ValueError(f"{self.name!r} takes an image beside the latent: call {task}")
        check_unit_interval(strength=request.strength)

    def _start(self, call: Call, request: Request, pair: Pair) -> tuple[Tensor | None, float]:
        """Return the latents to start from (None: pure noise), and the part of the grid that is run."""
        shape = self.stage.shape(call)
        if request.given is not None and request.strength < 1:
            return self.encode(request.given).expand(len(call.seeds), *shape), request.strength
        draft, concat = getattr(self.text, "draft", None), pair[0].concat
        covers = draft is not None and self.card.concat is None and shape[1:] == (draft.config.size,) * 2
        if covers and concat is not None and request.known is not None and not request.known.hole.all():
            return concat.float(), DRAFTED
        return None, 1.0

    def complete(self, call: Call, pixels: Tensor, request: Request, kept: Sequence[Tensor] = ()) -> Images:
        """Return decoded images (B, 3, H, W), with the predictions of the steps where they were kept."""

        def finished(made: Tensor) -> Tensor:
            return made if request.finish is None else request.finish(made)

        steps = torch.stack([finished(self.decode(x0)) for x0 in kept]) if kept else None
        return self.finish_images(call, finished(pixels), request, steps=steps)

    def image_draft(self, pixels: Tensor, *, prompted: bool = False) -> Known | None:
        """Return images' own latents, all known, in place of what the model draws of the text.

        Args:
            pixels: The images.
            prompted: Whether there is a prompt, from which a model that drafts makes its draft. A model with
                exemplars fits their layout to the images in any case. Default: False.

        Returns:
            None for a model that does neither.
        """
        drafts = getattr(self.text, "draft", None) is not None and not prompted
        if not drafts and not isinstance(self.text, ExemplarConditioner):
            return None
        latent = self.encode(pad_to_multiple(pixels, self.multiple))
        return Known(latent, torch.zeros_like(latent[:1, :1]))
