"""Large pictures by a network that sees a part at a time (MultiDiffusion, Bar-Tal et al. 2023, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.interfaces import Denoised, DenoiseFn

Crop = tuple[Any, slice, slice]  # an index of (B, C, h, w): every sample and channel, rows, columns


def window_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: at most tile − overlap apart, the last at its end."""
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def ramp(tile: int, overlap: int) -> Tensor:
    """The weight of a tile's pixels along one side: rising over the overlap, never 0."""
    edge = (torch.arange(tile) + 1.0) / (overlap + 1)
    return torch.minimum(torch.minimum(edge, edge.flip(0)), torch.ones(()))


def windowed(make: Callable[[Crop], DenoiseFn], tile: int, *, overlap: int) -> DenoiseFn:
    """The denoisers of overlapping windows of x_t (B, C, h, w), blended at every step with weights that fall
    towards the windows' edges.

    ``make`` gives the denoiser of a window, and is called once for each. As x0 and eps are affine in each
    other, blending both keeps x_t = alpha·x0 + sigma·eps.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: expected 0 to {tile - 1}, got {overlap}")
    made: dict[tuple[int, int, int, int], DenoiseFn] = {}

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        h, w = x_t.shape[-2:]
        th, tw = min(tile, h), min(tile, w)
        # (th, tw)
        weight = (ramp(th, min(overlap, th - 1))[:, None] * ramp(tw, min(overlap, tw - 1))).to(x_t)
        total = x_t.new_zeros(h, w)
        sums: list[Tensor] | None = None
        for top in window_starts(h, th, min(overlap, th - 1)):
            for left in window_starts(w, tw, min(overlap, tw - 1)):
                part = (..., slice(top, top + th), slice(left, left + tw))
                key = (top, left, th, tw)
                if key not in made:
                    made[key] = make(part)
                found = [value for value in made[key](x_t[part], t) if value is not None]
                sums = sums or [x_t.new_zeros(len(value), value.shape[1], h, w) for value in found]
                for whole, value in zip(sums, found, strict=True):
                    whole[part] += weight * value
                total[top : top + th, left : left + tw] += weight
        assert sums is not None
        return Denoised(*(value / total for value in sums))

    return fn


def tiled(denoiser: Denoiser, cond: Cond, tile: int, *, overlap: int) -> DenoiseFn:
    """The denoiser on tiles of x_t and `Cond.concat`: see `windowed`."""

    def make(part: Crop) -> DenoiseFn:
        return denoiser.bind(cond if cond.concat is None else replace(cond, concat=cond.concat[part]))

    return windowed(make, tile, overlap=overlap)
