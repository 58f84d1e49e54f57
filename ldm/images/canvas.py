"""The canvas of inpainting and outpainting: sizes that fit, a hole, its borders, and the given pixels put
back to the bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images.pixels import ImageInput, to_mask, to_pixels

NEIGHBOURS = torch.tensor([[[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]])
MARGINS = ("left", "right", "top", "bottom")


class Padded(UserWarning):
    """A picture's size does not fit the model: it was padded, and the result is cut back."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """Pictures with a hole.

    ``pixels`` (B, 3, H, W) in [0, 1], H and W being multiples of what the model asks for; ``hole`` (B or 1,
    1, H, W), 1 where pixels are to be made, 0 where they are known; ``frame`` (height, width) of the upper
    left part that is wanted, the rest being padding.
    """

    pixels: Tensor
    hole: Tensor
    frame: tuple[int, int]

    @classmethod
    def masked(cls, image: ImageInput, mask: ImageInput, *, multiple: int = 1) -> Canvas:
        """Pictures under a mask of their size, white where to repaint. A size that is no multiple is padded
        at the right and below by repeating the last column and row, of the mask too, with a warning;
        ValueError for a mask of another size, or one that is black all over.
        """
        pixels = to_pixels(image)
        hole = to_mask(mask, pixels.shape[-2:])
        if len(hole) not in (1, len(pixels)) and len(pixels) != 1:
            raise ValueError(
                f"mask: {len(hole)} masks for {len(pixels)} pictures; expected one, or one for each"
            )
        if not bool(hole.flatten(1).any(dim=1).all()):
            raise ValueError(
                "mask: black all over, so there is nothing to repaint; white is where the picture is made"
                " anew"
            )
        return cls(
            pixels=pad_to_multiple(pixels, multiple),
            hole=pad(hole, multiple),
            frame=(pixels.shape[-2], pixels.shape[-1]),
        )

    @classmethod
    def extended(
        cls,
        image: ImageInput,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        multiple: int = 1,
    ) -> Canvas:
        """Pictures with new room around them, in pixels. Where the sum is no multiple, more is made at the
        right and below, and cut off. ValueError for negative margins, or none at all.
        """
        margins = dict(zip(MARGINS, (left, right, top, bottom), strict=True))
        for side, width in margins.items():
            if not isinstance(width, int) or isinstance(width, bool) or width < 0:
                raise ValueError(f"{side}: expected a number of pixels of at least 0, got {width!r}")
        if not any(margins.values()):
            raise ValueError(
                "nothing to outpaint: expected at least one of left, right, top and bottom to be positive"
            )
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
        """The pictures with the hole filled smoothly from what surrounds it, so that an encoder sees nothing
        of what the hole hides."""
        return fill_hole(self.pixels, self.hole)

    def small(self, size: Sequence[int]) -> Tensor:
        """The hole (B or 1, 1, h, w) of a latent: a position is made anew if any of its pixels is."""
        return F.adaptive_max_pool2d(self.hole, tuple(size))

    def finish(self, made: Tensor, *, seam: float = 0.0, feather: int = 0) -> Tensor:
        """What was made (B, 3, H, W) in [0, 1] with the known pixels put back to the bit, cut to the frame:
        see `paste`."""
        h, w = self.frame
        return paste(made, self.pixels.to(made), self.hole.to(made), seam=seam, feather=feather)[..., :h, :w]


def pad(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with its last column and row repeated up to multiples of a number."""
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """`pad` of pictures, with a `Padded` warning where that changes them."""
    padded = pad(pixels, multiple)
    if padded.shape != pixels.shape:
        given, now = (f"{x.shape[-1]}×{x.shape[-2]}" for x in (pixels, padded))
        warnings.warn(
            f"{given} is no multiple of {multiple}: padded to {now} by its last column and row, then cut"
            " back",
            Padded,
            stacklevel=4,
        )
    return padded


def fill_hole(pixels: Tensor, hole: Tensor) -> Tensor:
    """Pictures or latents (B, C, H, W) continued into a hole (B or 1, 1, H, W) from its border inwards: ring
    by ring, each position is the mean of those of its eight neighbours that are filled. What is hole all over
    becomes 0.5.
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
    """``given`` outside the hole, to the bit, and inside it what was ``made``, each (B or 1, C, H, W) in [0,
    1].

    ``seam``: what was made is first brought to meet the given pixels at the border: `border_correction` with
    that reach, in pixels. ``feather``: over that many pixels inside the hole, the given picture passes over
    into the new one.
    """
    check_border(seam, feather)
    for _ in range(
        2 if seam > 0 else 0
    ):  # once more for what is left of too large steps: a border's neighbours smooth each other's correction
        made = torch.where(hole > 0, (made + border_correction(made, given, hole, seam)).clamp(0, 1), given)
    weight = soft(hole, feather)
    return torch.where(weight > 0, given + weight * (made - given) if feather else made, given)


def check_border(seam: float, feather: int) -> None:
    """ValueError for a border that is no number of pixels."""
    if not 0 <= seam < float("inf"):
        raise ValueError(f"seam: expected pixels of at least 0, got {seam!r}")
    if not isinstance(feather, int) or feather < 0:
        raise ValueError(f"feather: expected a whole number of pixels of at least 0, got {feather!r}")


def soft(hole: Tensor, feather: int) -> Tensor:
    """A hole (B, 1, H, W) whose weights rise from 1/(feather + 1) at its border to 1 at ``feather`` pixels
    inside; 0 outside."""
    total, known = hole, 1 - hole
    for _ in range(feather):
        known = F.max_pool2d(known, 3, stride=1, padding=1)
        total = total + (1 - known)
    return total / (feather + 1)


def border_correction(made: Tensor, given: Tensor, hole: Tensor, reach: float) -> Tensor:
    """What to add to ``made`` (B, C, H, W) in a hole (B or 1, 1, H, W), so that it meets ``given`` at the
    border; it fades within ``reach`` pixels.

    It solves (∇² − 1/reach²) c = 0 in the hole with c = given − made at the border and no slope at the
    canvas' edge: Poisson image editing (Pérez et al. 2003, eq. 4) with a screen, by conjugate gradients. So
    the step across the border becomes the one that was made there; or, where that is larger than the given
    picture's own, as large as those (`border_limit`): an edge just there would be seen as a seam.
    """
    b, c, h, w = torch.broadcast_shapes(made.shape, given.shape)
    kernel = NEIGHBOURS.to(made)

    def around(x: Tensor) -> Tensor:
        return F.conv2d(x.reshape(-1, 1, h, w), kernel, padding=1).view(x.shape)

    inside = hole.expand(b, c, h, w)
    diagonal = around(torch.ones_like(inside)) + reach**-2

    def operator(x: Tensor) -> Tensor:
        return inside * (diagonal * x - around(x))

    x, residual = torch.zeros_like(inside), torch.zeros_like(inside)
    for dim in (-1, -2):
        limit = border_limit(given, hole, dim)
        for sign in (1, -1):
            known, other, there = (_beside(part, dim, sign) for part in (1 - hole, made, given))
            step = made - other
            seen = (
                limit / step.abs().mean(1, keepdim=True).clamp_min(torch.finfo(step.dtype).tiny)
            ).clamp_max(1)  # of the step, which share stays
            residual = residual + inside * known * (there + seen * step - made)
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


def border_limit(given: Tensor, hole: Tensor, dim: int) -> Tensor:
    """The largest step (B, 1, 1, 1) across the border, a mean over channels: three quarters, as the
    correction fades with every pixel, of what 95 % of the steps between known neighbours along an axis keep
    within. Infinite where there are none, and where those are less than a level of 255: a flat picture is no
    reason to have no edges."""
    none = given.new_tensor(float("inf"))
    if given.shape[dim] < 2:
        return none.expand(len(given), 1, 1, 1)
    size = given.diff(dim=dim).abs().mean(1).flatten(1)
    known = (1 - hole).unfold(dim, 2, 1).amin(-1).flatten(1) > 0  # both of a pair
    limits = []
    for own in (steps[pairs] for steps, pairs in zip(*torch.broadcast_tensors(size, known), strict=True)):
        most = own.kthvalue(math.ceil(0.95 * len(own))).values if len(own) else none
        limits.append(0.75 * most if most > 1 / 255 else none)
    return torch.stack(limits).view(-1, 1, 1, 1)


def _beside(x: Tensor, dim: int, sign: int) -> Tensor:
    """For each position its neighbour before (1) or behind (-1) along an axis; 0 beyond the edge."""
    return F.pad(x, (sign, -sign) if dim == -1 else (0, 0, sign, -sign))
