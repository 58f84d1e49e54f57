"""Layouts: where the things of a prompt lie on the canvas.

A model with exemplars draws an image in two stages, as unCLIP does with an embedding. A prior draws a layout
of the prompt's things, p(layout | text), and the denoiser draws the image of the exemplars that are placed
so, p(image | exemplars, layout, text). The prior is a diffusion transformer whose tokens are the instances of
the things. This module holds what both share: the state that the prior denoises, and the placing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MEANS, SCALES = (0.5, 0.5, 0.6, 0.0), (0.22, 0.22, 0.25, 4.0)  # of x, y, side and tilt in training scenes
SMALLEST_SIDE, LARGEST_SIDE = 0.05, 1.5  # sides of a drawn instance


@dataclass(frozen=True, kw_only=True, eq=False)
class ThingLayout:
    """Where M instances of K things lie; lengths are fractions of the shorter side of the canvas.

    Attributes:
        places: Horizontal and vertical centre as fractions of the width and height, side, and tilt in degrees
            counterclockwise, shape (B, M, 4), float32.
        owner: The slot of each instance's thing, from 0, or −1 for an instance that is absent, shape (B, M),
            int64.
    """

    places: Tensor
    owner: Tensor

    def __getitem__(self, index: slice | Tensor) -> ThingLayout:
        """Return some of the layouts."""
        return ThingLayout(places=self.places[index], owner=self.owner[index])

    @staticmethod
    def cat(layouts: Sequence[ThingLayout]) -> ThingLayout:
        """Return several batches of layouts as one."""
        places, owners = [each.places for each in layouts], [each.owner for each in layouts]
        return ThingLayout(places=torch.cat(places), owner=torch.cat(owners))


def layout_channels(slots: int) -> int:
    """Return the channels of the state of a layout of K things, 4 + K."""
    return 4 + slots


def layout_state(layout: ThingLayout, slots: int) -> Tensor:
    """Return the state of layouts, shape (B, 4 + K, 1, M): an image of one row, whose pixels are instances.

    The channels are the four numbers of a place, standardized, and for each slot 1 if the instance shows it,
    else −1. The numbers of an absent instance are 0.

    Args:
        layout: The layouts.
        slots: K.
    """
    present = (layout.owner >= 0)[..., None]  # (B, M, 1)
    mean, scale = layout.places.new_tensor(MEANS), layout.places.new_tensor(SCALES)
    places = torch.where(present, (layout.places - mean) / scale, 0.0)  # (B, M, 4)
    owned = layout.owner[..., None] == torch.arange(slots, device=layout.owner.device)  # (B, M, K)
    return rearrange(torch.cat([places, 2.0 * owned - 1], dim=-1), "b m c -> b c 1 m")


def layout_of_state(state: Tensor, things: int) -> ThingLayout:
    """Return the layouts of denoised states.

    An instance is present if the largest number of its slots is positive. A thing without an instance has the
    one that is nearest to showing it.

    Args:
        state: Shape (B, 4 + K, 1, M).
        things: Number of things in the prompt, at most K. Other slots are absent.
    """
    values = rearrange(state.float(), "b c 1 m -> b m c")
    mean, scale = values.new_tensor(MEANS), values.new_tensor(SCALES)
    places = values[..., :4] * scale + mean  # (B, M, 4)
    x, y, side, tilt = places.unbind(-1)
    places = torch.stack([x, y, side.clamp(SMALLEST_SIDE, LARGEST_SIDE), tilt], dim=-1)  # (B, M, 4)
    if not things:
        return ThingLayout(places=places, owner=torch.full(places.shape[:2], -1, device=places.device))
    best, owner = values[..., 4 : 4 + things].max(dim=-1)  # (B, M)
    owner = torch.where(best > 0, owner, -1)
    for slot in range(things):
        nearest = values[..., 4 + slot].argmax(dim=1)  # (B,)
        absent = (owner != slot).all(dim=1)
        rows = absent.nonzero()[:, 0]
        owner[rows, nearest[rows]] = slot
    return ThingLayout(places=places, owner=owner)


def place_exemplars(images: Tensor, layout: ThingLayout, size: tuple[int, int]) -> Tensor:
    """Return exemplars as they lie on the canvas.

    They are sampled bilinearly, between their full, half and quarter size as they are shrunk.

    Args:
        images: Exemplars of K things in [0, 1], red, green and blue multiplied by opacity, and opacity, shape
            (B, K, 4, S, S).
        layout: Where they lie, B layouts of M instances.
        size: (H, W) of the canvas.

    Returns:
        The same four numbers for each thing, 0 where it is not, shape (B, K, 4, H, W), float32.
    """
    batch, k = images.shape[:2]
    canvas = torch.zeros(batch * k, 4, *size, dtype=torch.float32, device=images.device)
    sample, instance = (layout.owner >= 0).nonzero().unbind(-1)  # (N,) each
    if not len(sample):
        return canvas.unflatten(0, (batch, k))
    target = sample * k + layout.owner[sample, instance]  # (N,)
    drawn = _sampled(
        images.float().flatten(0, 1)[target], layout.places[sample, instance], size
    )  # (N, 4, H, W)
    canvas = canvas.index_add(0, target, drawn).clamp_max(1)
    return canvas.unflatten(0, (batch, k))


def _sampled(images: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (N, 4, S, S) at places (N, 4) on canvases of their own, (N, 4, H, W)."""
    h, w = size
    unit = min(h, w)
    x, y, side, tilt = places.float()[:, :, None, None].unbind(1)  # (N, 1, 1) each
    down, right = (torch.arange(n, dtype=torch.float32, device=places.device) + 0.5 for n in (h, w))
    dx, dy = (right[None, None] - x * w) / unit, (down[None, :, None] - y * h) / unit  # (N, 1, W), (N, H, 1)
    a, b = tilt.deg2rad().cos() / side, tilt.deg2rad().sin() / side
    points = torch.stack([a * dx - b * dy, b * dx + a * dy], dim=-1)  # (N, H, W, 2), the image is ±1/2
    step = images.shape[-1] / (side.flatten() * unit)  # pixels of the image per pixel of the canvas
    level = step.log2().clamp(0, 2)[:, None, None, None]
    drawn = torch.zeros(len(images), 4, h, w, dtype=torch.float32, device=images.device)
    for i in range(3):
        weight = (1 - (level - i).abs()).clamp_min(0)  # of an interpolation between two levels
        rows = weight.nonzero()[:, 0]
        plane = F.avg_pool2d(images[rows], 2**i)
        seen = F.grid_sample(plane, 2 * points[rows], padding_mode="zeros", align_corners=False)
        drawn.index_add_(0, rows, weight[rows] * seen)
    return drawn


def multiplied(images: Tensor) -> Tensor:
    """Return images (..., 4, H, W) with their colors multiplied by their opacity."""
    return torch.cat([images[..., :3, :, :] * images[..., 3:, :, :], images[..., 3:, :, :]], dim=-3)
