"""One diffusion of a chain of several: its denoiser and card, and how both make a state of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.catalog.unclip_cards import StageCard
from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import clip_x0
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.diffusion.noise import initial_noise, keyed_noise, keyed_normal
from ldm.pipelines.call import Call, all_hooks, progress_bar, settle
from ldm.samplers.invert import ddim_invert

STEPS = 2**40  # draws kept for each stage (and each candidate of the prior), so that no two share any
# numbers of stages; upsamplers and the candidates of a prior count up from theirs
UPSAMPLE, AUGMENT, PRIOR = (1, 64, 128)


def stage_noise(seeds: Sequence[int], stage: int) -> NoiseFn:
    """The noise of a stage: stage 0, the one that makes the picture, has that of every other pipeline; draw k
    of stage s is draw s·2^40 + k."""
    noise = keyed_noise(seeds)
    return lambda k, like: noise(stage * STEPS + k, like)


def first_noise(seeds: Sequence[int], stage: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape) that a stage starts from: the seeds' own for stage 0, else the last
    of its draws."""
    if stage == 0:
        return initial_noise(seeds, shape)
    return torch.stack([keyed_normal(seed, (stage + 1) * STEPS - 1, shape) for seed in seeds])


class Stage(nn.Module):
    """A denoiser with its card. ``number``: which noise is its own; ``label``: what it is called in
    messages."""

    def __init__(self, net: nn.Module, card: StageCard, *, number: int, label: str) -> None:
        super().__init__()
        self.card, self.number, self.label = card, number, label
        self.denoiser = make_denoiser(net, card)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.denoiser.parameters()).device

    def settle(self, prompt: Any, **options: Any) -> Call:
        """The call of some options, None for what the card says: see `ldm.pipelines.call.settle`; its steps
        are not kept."""
        if options.pop("keep_steps", False):
            raise ValueError("keep_steps: an unCLIP model keeps no steps; on_step sees the decoder's")
        return settle(cast(Any, self.card), self.denoiser.schedule, prompt, **options)

    def guided(self, cond: Cond, uncond: Cond, scale: float) -> DenoiseFn:
        """The denoiser under guidance, x0 clamped as the card says."""
        return self.clamped(cfg(self.denoiser, cond, uncond, scale))

    def clamped(self, fn: DenoiseFn) -> DenoiseFn:
        """A DenoiseFn with x0 clamped as the card says."""
        return fn if self.card.clip_x0 is None else clip_x0(fn, self.denoiser.schedule, self.card.clip_x0)

    def start(self, call: Call, shape: Sequence[int], *, number: int | None = None) -> Tensor:
        """The first state (B, *shape), float32 on the device: the call's latents, or the noise of its
        seeds."""
        noise = call.latents
        if noise is None:
            noise = first_noise(call.seeds, self.number if number is None else number, shape)
        elif tuple(noise.shape) != (len(call.seeds), *shape):
            raise ValueError(
                f"latents of the {self.label} have shape {tuple(noise.shape)}, expected"
                f" {(len(call.seeds), *shape)}"
            )
        return noise.to(self.device, torch.float32) * call.rules.start_scale(call.grid)

    def run(
        self, fn: DenoiseFn, x: Tensor, call: Call, *, number: int | None = None, hook: OnStep | None = None
    ) -> Tensor:
        """The end of the call's grid from a first state."""
        noise = stage_noise(call.seeds, self.number if number is None else number)
        with progress_bar(len(call.grid), call.progress) as bar:
            on_step = all_hooks(hook or call.on_step, lambda *_: bar.update())
            return call.solve(fn, x, call.grid, noise=noise, on_step=on_step, **call.options)

    def invert(self, fn: DenoiseFn, x: Tensor, grid: TimeGrid, *, iterations: int = 1) -> Tensor:
        """The first state that DDIM leads to x from."""
        return ddim_invert(fn, x, grid, iterations=iterations)


def make_denoiser(net: nn.Module, card: StageCard) -> Denoiser:
    """A network under its card."""
    return Denoiser(
        net,
        card.schedule.make(),
        card.prediction,
        learned_var=card.learned_var,
        quantize=card.grids().quantize,
    )
