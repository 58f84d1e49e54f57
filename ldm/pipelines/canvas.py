"""The canvas of inpainting and outpainting: sizes that fit, a hole, its borders, and the given pixels put back to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.pipelines.pixels import Picture, to_mask, to_pixels

NEIGHBOURS = torch.tensor([[[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]])
MARGINS = ("left", "right", "top", "bottom")


class Padded(UserWarning):
    """A picture's size does not fit the model: it was padded, and the result is cut back."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """Pictures with a hole.

    ``pixels`` (B, 3, H, W) in [0, 1], H and W being multiples of what the model asks for; ``hole`` (B or 1, 1, H, W), 1 where pixels are to be made,
    0 where they are known; ``frame`` (height, width) of the upper left part that is wanted, the rest being padding.
    """

    pixels: Tensor
    hole: Tensor
    frame: tuple[int, int]

    @classmethod
    def masked(cls, image: Picture, mask: Picture, *, multiple: int = 1) -> Canvas:
        """Pictures under a mask of their size, white where to repaint. A size that is no multiple is padded at the right and below by repeating
        the last column and row, of the mask too, with a warning; ValueError for a mask of another size, or one that is black all over.
        """
        pixels = to_pixels(image)
        hole = to_mask(mask, pixels.shape[-2:])
        if len(hole) not in (1, len(pixels)) and len(pixels) != 1:
            raise ValueError(f"mask: {len(hole)} masks for {len(pixels)} pictures; expected one, or one for each")
        if not bool(hole.flatten(1).any(dim=1).all()):
            raise ValueError("mask: black all over, so there is nothing to repaint; white is where the picture is made anew")
        return cls(pixels=fit(pixels, multiple), hole=pad(hole, multiple), frame=(pixels.shape[-2], pixels.shape[-1]))

    @classmethod
    def extended(cls, image: Picture, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, multiple: int = 1) -> Canvas:
        """Pictures with new room around them, in pixels. Where the sum is no multiple, more is made at the right and below, and cut off.
        ValueError for negative margins, or none at all.
        """
        margins = dict(zip(MARGINS, (left, right, top, bottom), strict=True))
        for side, width in margins.items():
            if not isinstance(width, int) or isinstance(width, bool) or width < 0:
                raise ValueError(f"{side}: expected a number of pixels of at least 0, got {width!r}")
        if not any(margins.values()):
            raise ValueError("nothing to outpaint: expected at least one of left, right, top and bottom to be positive")
        pixels = to_pixels(image)
        h, w = top + pixels.shape[-2] + bottom, left + pixels.shape[-1] + right
        room = (left, right + -w % multiple, top, bottom + -h % multiple)
        hole = F.pad(torch.zeros(1, 1, *pixels.shape[-2:]), room, value=1.0)
        return cls(pixels=F.pad(pixels, room), hole=hole, frame=(h, w))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), padding included."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def filled(self) -> Tensor:
        """The pictures with the hole filled smoothly from what surrounds it, so that an encoder sees nothing of what the hole hides."""
        return fill(self.pixels, self.hole)

    def small(self, size: Sequence[int]) -> Tensor:
        """The hole (B or 1, 1, h, w) of a latent: a position is made anew if any of its pixels is."""
        return F.adaptive_max_pool2d(self.hole, tuple(size))

    def finish(self, made: Tensor, *, seam: float = 0.0, feather: int = 0) -> Tensor:
        """What was made (B, 3, H, W) in [0, 1] with the known pixels put back to the bit, cut to the frame: see `paste`."""
        h, w = self.frame
        return paste(made, self.pixels.to(made), self.hole.to(made), seam=seam, feather=feather)[..., :h, :w]


def pad(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with its last column and row repeated up to multiples of a number."""
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")


def fit(pixels: Tensor, multiple: int) -> Tensor:
    """`pad` of pictures, with a `Padded` warning where that changes them."""
    padded = pad(pixels, multiple)
    if padded.shape != pixels.shape:
        given, now = (f"{x.shape[-1]}×{x.shape[-2]}" for x in (pixels, padded))
        warnings.warn(f"{given} is no multiple of {multiple}: padded to {now} by its last column and row, then cut back", Padded, stacklevel=4)
    return padded


def fill(pixels: Tensor, hole: Tensor) -> Tensor:
    """Pictures or latents (B, C, H, W) continued into a hole (B or 1, 1, H, W) from its border inwards: ring by ring, each position is the mean of
    those of its eight neighbours that are filled. What is hole all over becomes 0.5.
    """
    n = max(len(pixels), len(hole))
    known, pixels = 1 - hole.expand(n, -1, -1, -1), pixels.expand(n, -1, -1, -1)
    none = known.flatten(1).amax(dim=1) == 0
    known = torch.where(none[:, None, None, None], torch.ones_like(known), known)
    pixels = torch.where(none[:, None, None, None], torch.full_like(pixels, 0.5), pixels) * known
    while not bool(known.all()):
        share = F.avg_pool2d(known, 3, stride=1, padding=1)
        means = F.avg_pool2d(pixels, 3, stride=1, padding=1) / share.clamp_min(1e-12)
        pixels = torch.where(known > 0, pixels, means)
        known = (share > 0).to(known)
    return pixels


def paste(made: Tensor, given: Tensor, hole: Tensor, *, seam: float = 0.0, feather: int = 0) -> Tensor:
    """``given`` outside the hole, to the bit, and inside it what was ``made``, each (B or 1, C, H, W) in [0, 1].

    ``seam``: what was made is first brought to meet the given pixels at the border: `border_correction` with that reach, in pixels.
    ``feather``: over that many pixels inside the hole, the given picture passes over into the new one.
    """
    check_border(seam, feather)
    if seam > 0:
        made = (made + border_correction(given - made, hole, seam)).clamp(0, 1)
    weight = soft(hole, feather)
    return torch.where(weight > 0, given + weight * (made - given) if feather else made, given)


def check_border(seam: float, feather: int) -> None:
    """ValueError for a border that is no number of pixels."""
    if not 0 <= seam < float("inf"):
        raise ValueError(f"seam: expected pixels of at least 0, got {seam!r}")
    if not isinstance(feather, int) or feather < 0:
        raise ValueError(f"feather: expected a whole number of pixels of at least 0, got {feather!r}")


def soft(hole: Tensor, feather: int) -> Tensor:
    """A hole (B, 1, H, W) whose weights rise from 1/(feather + 1) at its border to 1 at ``feather`` pixels inside; 0 outside."""
    total, known = hole, 1 - hole
    for _ in range(feather):
        known = F.max_pool2d(known, 3, stride=1, padding=1)
        total = total + (1 - known)
    return total / (feather + 1)


def border_correction(difference: Tensor, hole: Tensor, reach: float) -> Tensor:
    """The difference (B, C, H, W) that known pixels have at the border of a hole (B or 1, 1, H, W), carried into it, fading within ``reach`` pixels.

    It solves (∇² − 1/reach²) c = 0 in the hole with c = difference at the border and no slope at the canvas' edge: Poisson image editing (Pérez
    et al. 2003, eq. 4) with a screen, by conjugate gradients. So the step across the border becomes the one that was made there.
    """
    b, c, h, w = difference.shape
    kernel = NEIGHBOURS.to(difference)

    def around(x: Tensor) -> Tensor:
        return F.conv2d(x.reshape(-1, 1, h, w), kernel, padding=1).view(x.shape)

    inside = hole.expand(b, c, h, w)
    diagonal = around(torch.ones_like(inside)) + reach**-2

    def operator(x: Tensor) -> Tensor:
        return inside * (diagonal * x - around(x))

    x = torch.zeros_like(difference)
    residual = inside * around((1 - inside) * difference)
    direction, energy = residual, residual.square().sum()
    goal = 1e-10 * energy
    for _ in range(10 * (h + w)):
        if energy <= goal:
            break
        along = operator(direction)
        step = energy / (direction * along).sum()
        x, residual = x + step * direction, residual - step * along
        before, energy = energy, residual.square().sum()
        direction = residual + energy / before * direction
    return x
