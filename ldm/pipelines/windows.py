"""Large images by a network that sees a part at a time (MultiDiffusion, Bar-Tal et al. 2023, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.interfaces import Denoised, DenoiseFn

Crop = tuple[Any, slice, slice]  # an index of (B, C, h, w): all samples and channels, rows, columns


def window_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return where windows begin along a side: at most tile − overlap apart, the last one at its end."""
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def ramp(tile: int, overlap: int) -> Tensor:
    """Return the weights (tile,) of positions along a window's side: rising over the overlap, never 0."""
    edge = (torch.arange(tile, device="cpu", dtype=torch.float32) + 1.0) / (overlap + 1)
    return torch.minimum(torch.minimum(edge, edge.flip(0)), torch.ones_like(edge))


def windowed(make: Callable[[Crop], DenoiseFn], tile: int, *, overlap: int) -> DenoiseFn:
    """Return a DenoiseFn that blends the predictions of overlapping windows at every step.

    Weights fall towards the edges of a window. As x0 and eps are affine in each other, blending both keeps
    x_t = alpha·x0 + sigma·eps.

    Args:
        make: Makes the DenoiseFn of a window; called once for each.
        tile: Side of a window, in positions of the state.
        overlap: Positions that neighbouring windows share, 0 to tile − 1.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: expected 0 to {tile - 1}, got {overlap}")
    made: dict[tuple[int, int, int, int], DenoiseFn] = {}

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        h, w = x_t.shape[-2:]
        th, tw = min(tile, h), min(tile, w)
        # weights of a window, (th, tw)
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
    """Return the denoiser on windows of x_t and `Cond.concat`; see `windowed`."""

    def make(part: Crop) -> DenoiseFn:
        return denoiser.bind(cond if cond.concat is None else replace(cond, concat=cond.concat[part]))

    return windowed(make, tile, overlap=overlap)
