"""The prior over layouts of a model with exemplars: its schedule, and drawing from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.noise import keyed_normal
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.dit import DiT, DiTConfig
from ldm.models.layout import ThingLayout, layout_channels, layout_of_state
from ldm.samplers.ode.dpmpp_2m import dpmpp_2m

LAYOUT_PREDICTION: Prediction = "x0"
INSTANCES = 4
"""The largest number of instances in a layout."""
LAYOUT_STEPS = 6
"""Evaluations of the prior for a layout, unless the model's card states others."""
LAYOUT_ROWS = 4
"""Number of layouts that are drawn at once; one takes as long, as the calls of operators take the time."""
LAYOUT_NOISE = 1 << 62
"""The number of a layout's noise among the keyed draws of a seed; those of a sampler's steps are smaller."""


def layout_denoiser(net: DiT) -> Denoiser:
    """Return the denoiser of layouts of a network: a cosine schedule, the prediction x0."""
    return Denoiser(net, layout_schedule(), LAYOUT_PREDICTION)


@cache
def layout_schedule() -> NoiseSchedule:
    """Return the schedule of layouts, made once."""
    with torch.inference_mode(False):  # trainings use it too
        return NoiseSchedule.make("cosine", 1000)


def slots_of(config: DiTConfig) -> int:
    """Return the number of things that a prior over layouts places.

    Raises:
        ValueError: If the network is none.
    """
    channels = (config.in_channels, config.out_channels)
    if channels[0] != channels[1] or channels[0] <= layout_channels(0) or config.patch != 1 or config.slots:
        raise ValueError(
            f"in_channels, out_channels {channels}, patch {config.patch}, slots {config.slots}: expected of a"
            " prior over layouts the same number twice, four and at least one thing, 1 and 0"
        )
    return channels[0] - layout_channels(0)


@torch.no_grad()
def draw_states(denoiser: Denoiser, cond: Cond, noise: Tensor, steps: int = LAYOUT_STEPS) -> Tensor:
    """Return the states of layouts (`ldm.models.layout`) that noise becomes, (B, 4 + K, 1, M).

    Args:
        denoiser: See `layout_denoiser`.
        cond: The context of B texts.
        noise: Standard normal, (B, 4 + K, 1, M).
        steps: Number of evaluations of the network. Default: `LAYOUT_STEPS`.
    """
    grid = TimeGrid.make(denoiser.schedule, steps, spacing="trailing")
    return dpmpp_2m(cfg(denoiser, cond, Cond(), 1.0), noise, grid)


@torch.no_grad()
def draw_layouts(
    denoiser: Denoiser,
    cond: Cond,
    things: Sequence[int],
    *,
    seeds: Sequence[int],
    steps: int = LAYOUT_STEPS,
    rows: int | None = None,
) -> ThingLayout:
    """Draw a layout for each condition, a function of the condition and the seed.

    Args:
        denoiser: See `layout_denoiser`.
        cond: The context of B texts.
        things: Number of things in each text.
        seeds: B seeds.
        steps: See `draw_states`. Default: `LAYOUT_STEPS`.
        rows: Number of layouts that are computed at once; fewer are computed beside copies of the last one.
            As all products then have the same shape, a layout has the same bits in every batch. None for the
            whole batch. Default: None.

    Returns:
        B layouts of `INSTANCES` instances; where there are no things, of none.
    """
    net = denoiser.net
    assert isinstance(net, DiT)
    device = net.embed_in.weight.device
    places = torch.zeros(len(things), INSTANCES, 4, dtype=torch.float32, device=device)
    owner = torch.full(places.shape[:2], -1, device=device)
    drawn = [i for i, count in enumerate(things) if count]
    shape = (net.config.in_channels, 1, INSTANCES)
    size = rows or max(1, len(drawn))
    for first in range(0, len(drawn), size):
        group = drawn[first : first + size]
        filled = group + group[-1:] * (size - len(group))
        noise = torch.stack([keyed_normal(seeds[i], LAYOUT_NOISE, shape) for i in filled])
        chosen = cond[torch.tensor(filled, device=device)]
        states = draw_states(denoiser, chosen, noise.to(device), steps)
        for i, state in zip(group, states, strict=False):
            layout = layout_of_state(state[None], things[i])
            places[i], owner[i] = layout.places[0], layout.owner[0]
    return ThingLayout(places=places, owner=owner)
