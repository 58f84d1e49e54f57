"""One diffusion: a denoiser, the space it works in, and its card. All tasks of all pipelines sample here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.catalog.cards import DiffusionCard
from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import keep_known
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import cfg, compose
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn, OnStep
from ldm.diffusion.noise import initial_noise, keyed_noise, keyed_normal
from ldm.models.control.controlled import Controlled
from ldm.pipelines.call import Call, settle
from ldm.pipelines.checks import check_hooks
from ldm.pipelines.conditions import Pair, crop_condition, crop_hints
from ldm.pipelines.control.control_use import control_parts
from ldm.pipelines.stages.space import Space
from ldm.pipelines.windows import Crop, windowed
from ldm.support.calls import checkpoint
from ldm.support.progress import progress_bar

# Draws kept for each stage (and each candidate of the prior), so that no two share any. Draw k of stage s is
# draw s·2^40 + k of the seed.
DRAWS_PER_STAGE = 2**40
# Numbers of stages: 0 makes the image; upsamplers and the candidates of a prior count up from theirs.
UPSAMPLE, AUGMENT, PRIOR = 1, 64, 128

# The task of models that take channels beside x_t, by kind of channels.
CONCAT_TASKS = {
    "inpaint": "inpaint",
    "inpaint-ldm": "inpaint",
    "depth": "depth_to_image",
    "image": "instruct",
    "lowres": "upscale",
    "lowres-noised": "upscale",
}

Guide = Callable[[Denoiser, Cond, Cond, float], DenoiseFn]
StepHook = Callable[[int, Tensor, Denoised], object]  # (step, state after it, prediction it took)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One diffusion, ready to sample.

    Attributes:
        denoiser: The network, its schedule and what it predicts.
        card: Schedule, grids of the samplers, defaults.
        space: Latent or pixel space; None for a diffusion of embeddings.
        name: Name of the model, for error messages.
        number: Which draws of a seed are this stage's; 0 for the stage that makes the image.
        label: Name of the stage in error messages.
        guide: Makes the guided denoiser of (denoiser, cond, uncond, scale). Default: `cfg`.
        concat: What is joined to x_t (see `ldm.catalog.cards`); None: nothing.
    """

    denoiser: Denoiser
    card: DiffusionCard
    name: str
    space: Space | None = None
    number: int = 0
    label: str = "model"
    concat: str | None = None
    guide: Guide = cfg

    @property
    def device(self) -> torch.device:
        """Device that the denoiser computes on."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the denoiser computes in; the state of a sampler is float32."""
        return self.denoiser.dtype or torch.float32

    @property
    def images(self) -> Space:
        """The space, for stages that make images."""
        if self.space is None:
            raise ValueError(f"the {self.label} makes embeddings, not images")
        return self.space

    @property
    def side(self) -> int:
        """The longer side, in pixels, of the images that the card's defaults make."""
        return max(self.card.defaults.height, self.card.defaults.width)

    @property
    def multiple(self) -> int:
        """Number of which the sides of an image must be multiples.

        It is the autoencoder's factor, times that of the denoising network.
        """
        config: Any = self.denoiser.net.config  # a denoising network's, or that of a network around one
        return self.images.factor * config.multiple

    def require(self, *kinds: str) -> None:
        """Raise ValueError unless the model takes one of these kinds of channels beside x_t."""
        if self.concat not in kinds:
            task = CONCAT_TASKS.get(self.concat or "", "text_to_image")
            raise ValueError(f"{self.name!r} has no input channels for this task; what it does: {task}")

    def settle(self, prompt: Any, **options: Any) -> Call:
        """Settle the options of a call; see `ldm.pipelines.call.settle`."""
        return settle(self.card, self.denoiser.schedule, prompt, **options)

    def shape(self, call: Call) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the call's states; ValueError for a size that does not fit."""
        return self.images.shape(call.height, call.width)

    def check_shape(self, call: Call, shape: Sequence[int] | None = None) -> None:
        """Raise ValueError for a size that does not fit, or for latents or a hook that are none."""
        check_hooks(call.latents, call.on_step)
        shape = self.shape(call) if shape is None else tuple(shape)
        if call.latents is not None and tuple(call.latents.shape) != (len(call.seeds), *shape):
            raise ValueError(
                f"latents of the {self.label} have shape {tuple(call.latents.shape)}, expected"
                f" {(len(call.seeds), *shape)}"
            )

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] as states on the stage's device."""
        return self.images.encode(pixels, self.device)

    def noise(self, call: Call, shape: Sequence[int] | None = None) -> Tensor:
        """Return standard normal noise for each sample of a call.

        Args:
            call: The call; its `latents`, where given, are the noise.
            shape: Shape of a sample. Default: that of the call's images.

        Returns:
            Noise (B, *shape), float32 on the stage's device.

        Raises:
            ValueError: If the call's latents have another shape.
        """
        shape = self.shape(call) if shape is None else tuple(shape)
        self.check_shape(call, shape)
        given = first_noise(call.seeds, self.number, shape) if call.latents is None else call.latents
        return given.to(self.device, torch.float32)

    def step_noise(self, call: Call) -> NoiseFn:
        """Return the noise of the sampler's steps: the convention's for stage 0, else own draws."""
        if self.number == 0:
            return call.rules.noise(call.seeds, call.grid, call.sampler, **call.options)
        return stage_noise(call.seeds, self.number)

    def begin(
        self,
        call: Call,
        *,
        start: Tensor | None = None,
        strength: float = 1.0,
        shape: Sequence[int] | None = None,
    ) -> tuple[Call, Tensor]:
        """Return the call over the part of its grid that is run, and the state that it starts from.

        Args:
            call: The call.
            start: Clean states (B, C, h, w) to start from, noised to where the grid's last part begins.
                Default: pure noise.
            strength: Part of the grid that is run from `start`, in [0, 1].
            shape: Shape of a sample, where it is not that of the call's images.
        """
        noise = self.noise(call, shape)
        grid, x = call.rules.begin(call.grid, noise, start, 1.0 if start is None else strength)
        return call.over(grid), x

    def guided(
        self, call: Call, pair: Pair, *, window: int | None = None, image_guidance: float | None = None
    ) -> DenoiseFn:
        """Return the guided denoiser of a call.

        Args:
            call: The call, which states the guidance scale.
            pair: The conditional and the unconditional condition.
            window: Side, in pixels, of what the network sees at a time. Larger states are covered by windows
                that overlap by half and are blended at every step. Default: the whole state.
            image_guidance: Weight of the image condition (InstructPix2Pix); None for models without one.
        """
        if self.space is None:
            return self._guided(call, pair, image_guidance)
        size = self.shape(call)[1:]
        tile = self.tile(size, window)

        def of_window(crop: Crop) -> DenoiseFn:
            cropped = (crop_condition(pair[0], crop, size), crop_condition(pair[1], crop, size))
            cropped = (crop_hints(cropped[0], crop, size), crop_hints(cropped[1], crop, size))
            return self._guided(call, cropped, image_guidance)

        if tile >= max(size):
            return self._guided(call, pair, image_guidance)
        return windowed(of_window, tile, overlap=tile // 2)

    def tile(self, size: tuple[int, int], window: int | None) -> int:
        """Return the side of what the network sees at a time of a state of `size` (h, w).

        Raises:
            ValueError: If the window, in pixels, is smaller than the space's factor.
        """
        if window is None:
            return max(size)
        factor = self.images.factor
        if window < factor:
            raise ValueError(f"window: expected a side of at least {factor} pixels, got {window}")
        return window // factor

    def _guided(self, call: Call, pair: Pair, image_guidance: float | None) -> DenoiseFn:
        """Guide the denoiser in the way that the model takes it, and clamp x0 as the card says."""
        cond, uncond = pair
        denoiser = self.quantized(call)
        if self.reads_guidance:
            scale = torch.full((len(call.seeds),), call.guidance, device=self.device, dtype=torch.float32)
            return self.clamped(denoiser.bind(replace(cond, guidance=scale)))
        if image_guidance is None:
            return self.clamped(self.guide(denoiser, cond, uncond, call.guidance))
        assert uncond.concat is not None
        nothing = replace(uncond, concat=torch.zeros_like(uncond.concat))
        # e(0) + s_I·(e(image) − e(0)) + s_T·(e(image, text) − e(image)), collected by condition
        weights = [(cond, call.guidance), (uncond, image_guidance - call.guidance)]
        return self.clamped(compose(denoiser, weights, nothing))

    def evaluates_both(self, call: Call, image_guidance: float | None = None) -> bool:
        """Return whether `guided` evaluates the unconditional condition, as far as is known of its method."""
        if image_guidance is not None or self.guide is not cfg:
            return True
        return call.guidance != 1 and not self.reads_guidance

    @property
    def reads_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network, as in latent consistency models."""
        return getattr(self.denoiser.net.config, "guidance_dim", None) is not None

    def quantized(self, call: Call) -> Denoiser:
        """Return the denoiser of a call, with the call's controls around its network.

        It rounds t to table entries where the call's convention does.
        """
        own = self.denoiser
        quantize, net = own.quantize or call.rules.quantize, own.net
        if call.controls:
            t = call.grid.t.round() if quantize else call.grid.t
            net = Controlled(net, control_parts(call.controls, own.schedule.network_time(t).tolist()))
        if net is own.net and quantize == own.quantize:
            return own
        return Denoiser(net, own.schedule, own.prediction, learned_var=own.learned_var, quantize=quantize)

    def clamped(self, fn: DenoiseFn) -> DenoiseFn:
        """Return a DenoiseFn whose x0 is clamped as the card says."""
        return self.card.constrain(fn, self.denoiser.schedule)

    def sample(
        self,
        call: Call,
        x: Tensor,
        pair: Pair,
        *,
        known: tuple[Tensor, Tensor] | None = None,
        window: int | None = None,
        image_guidance: float | None = None,
        hooks: Sequence[StepHook] = (),
    ) -> Tensor:
        """Sample: run the call's sampler from a first state, under guidance.

        Args:
            call: The call, over the grid that is run (see `begin`).
            x: The first state (B, C, h, w).
            pair: The conditional and the unconditional condition.
            known: A clean state (B or 1, C, h, w) and a mask (B or 1, 1, h, w), 1 where it is to be replaced;
                elsewhere it is kept.
            window, image_guidance: See `guided`.
            hooks: Called after every step, before the caller's own `on_step`.

        Returns:
            The last state (B, C, h, w), float32.
        """
        fn = self.guided(call, pair, window=window, image_guidance=image_guidance)
        if known is not None:
            fn = keep_known(fn, self.denoiser.schedule, *known)
        return self.solve(call, fn, x, hooks)

    def solve(self, call: Call, fn: DenoiseFn, x: Tensor, hooks: Sequence[StepHook] = ()) -> Tensor:
        """Run the call's sampler over its grid with any DenoiseFn; the arguments are those of `sample`."""
        with progress_bar(len(call.grid), call.progress, leave=False) as bar:
            total = len(call.grid)
            follow: StepHook = lambda i, *_: checkpoint(i + 1, total)  # noqa: E731
            hook = chain_hooks(call.on_step, lambda *_: bar.update(), *hooks, follow)
            noise = self.step_noise(call)
            return call.solve(fn, x, call.grid, noise=noise, on_step=hook, **call.options)


def first_noise(seeds: Sequence[int], number: int, shape: Sequence[int]) -> Tensor:
    """Return the standard normal noise (B, *shape) that a stage starts from, float32 on the CPU.

    For stage 0 it is the seeds' own first noise, for others the last of the stage's draws.
    """
    if number == 0:
        return initial_noise(seeds, shape)
    last = (number + 1) * DRAWS_PER_STAGE - 1
    return torch.stack([keyed_normal(seed, last, shape) for seed in seeds])


def stage_noise(seeds: Sequence[int], number: int) -> NoiseFn:
    """Return the noise of a stage's steps: draw k of stage s is draw s·2^40 + k of each seed."""
    noise = keyed_noise(seeds)
    return lambda k, like: noise(number * DRAWS_PER_STAGE + k, like)


def chain_hooks(own: OnStep | None, *others: StepHook) -> OnStep:
    """Return a hook that calls the others, then the caller's own, which may return a new state or stop."""

    def hook(i: int, x: Tensor, d: Denoised) -> Tensor | None:
        for other in others:
            other(i, x, d)
        return None if own is None else own(i, x, d)

    return hook
