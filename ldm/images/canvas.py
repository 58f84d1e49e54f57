"""Images with a hole, for inpainting and outpainting: padding, filling, border correction and pasting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images.opening import check_pixels
from ldm.images.pixels import ImageInput, to_mask, to_pixels
from ldm.support.warn import warn_user

FOUR_NEIGHBORS = torch.tensor(
    [[[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]], device="cpu", dtype=torch.float32
)
MARGINS = ("left", "right", "top", "bottom")


class Padded(UserWarning):
    """The size of an image does not fit the model: it was padded, and the result is cropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """Images with a hole.

    Args:
        pixels: The images, shape (B, 3, H, W), in [0, 1]; H and W are multiples of the model's factor.
        hole: Shape (B or 1, 1, H, W): 1 where pixels are generated, 0 where they are known.
        frame: (height, width) of the upper left part that is returned; the rest is padding.
    """

    pixels: Tensor
    hole: Tensor
    frame: tuple[int, int]

    @classmethod
    def masked(cls, image: ImageInput, mask: ImageInput, *, multiple: int = 1) -> Canvas:
        """Return the canvas of images under a mask.

        Images and mask are padded at the right and bottom to a multiple, by repeating the last column and
        row, with a `Padded` warning.

        Args:
            image: The images; see `ImageInput`.
            mask: One mask, or one per image, of the images' size: white (1) where to repaint.
            multiple: What the sides must be a multiple of. Default: 1.

        Raises:
            ValueError: For a mask of another size, a mask that is black everywhere, or a wrong number of
                masks.
        """
        pixels = to_pixels(image)
        hole = to_mask(mask, pixels.shape[-2:])
        if len(hole) not in (1, len(pixels)) and len(pixels) != 1:
            raise ValueError(
                f"mask: {len(hole)} masks for {len(pixels)} images; expected one, or one per image"
            )
        if not bool(hole.flatten(1).any(dim=1).all()):
            raise ValueError(
                "mask: black everywhere, so there is nothing to repaint; white marks what is repainted"
            )
        return cls(
            pixels=pad_to_multiple(pixels, multiple),
            hole=repeat_edges(hole, multiple),
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
        """Return the canvas of images with empty margins around them.

        Args:
            image: The images; see `ImageInput`.
            left: Width of the left margin in pixels. Default: 0.
            right: Width of the right margin in pixels. Default: 0.
            top: Height of the top margin in pixels. Default: 0.
            bottom: Height of the bottom margin in pixels. Default: 0.
            multiple: What the sides must be a multiple of; larger right and bottom margins are generated and
                cropped. Default: 1.

        Raises:
            ValueError: If a margin is negative, or all are 0.
        """
        margins = dict(zip(MARGINS, (left, right, top, bottom), strict=True))
        for side, width in margins.items():
            if not isinstance(width, int) or isinstance(width, bool) or width < 0:
                raise ValueError(f"{side}: expected a whole number of pixels, at least 0, got {width!r}")
        if not any(margins.values()):
            raise ValueError(
                "nothing to outpaint: at least one of left, right, top and bottom must be positive"
            )
        pixels = to_pixels(image)
        h, w = top + pixels.shape[-2] + bottom, left + pixels.shape[-1] + right
        check_pixels(w, h)
        padding = (left, right + -w % multiple, top, bottom + -h % multiple)
        hole = F.pad(
            torch.zeros(1, 1, *pixels.shape[-2:], device=pixels.device, dtype=torch.float32),
            padding,
            value=1.0,
        )
        return cls(pixels=F.pad(pixels, padding), hole=hole, frame=(h, w))

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W), padding included."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def filled(self) -> Tensor:
        """Return the images with the hole filled from its border, so that an encoder sees no hidden pixel."""
        return fill_hole(self.pixels, self.hole)

    def small(self, size: Sequence[int]) -> Tensor:
        """Return the hole at the size (h, w) of a latent, shape (B or 1, 1, h, w): 1 if any pixel is 1."""
        return F.adaptive_max_pool2d(self.hole, tuple(size))

    def finish(self, made: Tensor, *, seam: float = 0.0, feather: int = 0) -> Tensor:
        """Return generated images with the known pixels restored exactly, cropped to the frame.

        Args:
            made: The generated images, shape (B, 3, H, W), in [0, 1].
            seam: Reach of the border correction in pixels; see `paste`. Default: 0.
            feather: Width of the blend in pixels; see `paste`. Default: 0.
        """
        h, w = self.frame
        return paste(made, self.pixels.to(made), self.hole.to(made), seam=seam, feather=feather)[..., :h, :w]


def repeat_edges(x: Tensor, multiple: int) -> Tensor:
    """Return (B, C, H, W) with the last column and row repeated until the sides are multiples."""
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Return images (B, C, H, W) padded by `repeat_edges`; a `Padded` warning tells if that changed them."""
    padded = repeat_edges(pixels, multiple)
    if padded.shape != pixels.shape:
        given, now = (f"{x.shape[-1]}×{x.shape[-2]}" for x in (pixels, padded))
        warn_user(
            f"{given} is not a multiple of {multiple}: padded to {now} by repeating the last column and row;"
            " the result is cropped",
            Padded,
        )
    return padded


def fill_hole(pixels: Tensor, hole: Tensor) -> Tensor:
    """Return images or latents with a hole filled from its border inwards.

    Ring by ring, each position becomes the mean of those of its eight neighbors that are filled.

    Args:
        pixels: Shape (B, C, H, W).
        hole: Shape (B or 1, 1, H, W), 1 in the hole. An image that is all hole becomes 0.5.
    """
    n = max(len(pixels), len(hole))
    known, pixels = 1 - hole.expand(n, -1, -1, -1), pixels.expand(n, -1, -1, -1)
    empty = (known.flatten(1).amax(dim=1) == 0)[:, None, None, None]
    known = torch.where(empty, torch.ones_like(known), known)
    pixels = torch.where(empty, torch.full_like(pixels, 0.5), pixels) * known
    while not bool(known.all()):
        share = F.avg_pool2d(known, 3, stride=1, padding=1)
        means = F.avg_pool2d(pixels, 3, stride=1, padding=1) / share.clamp_min(1e-12)
        pixels = torch.where(known > 0, pixels, means)
        known = (share > 0).to(known)
    return pixels


def paste(made: Tensor, given: Tensor, hole: Tensor, *, seam: float = 0.0, feather: int = 0) -> Tensor:
    """Return generated images inside the hole and the given images, unchanged, outside it.

    Args:
        made: The generated images, shape (B or 1, C, H, W), in [0, 1].
        given: The given images, shape (B or 1, C, H, W), in [0, 1].
        hole: Shape (B or 1, 1, H, W), 1 in the hole.
        seam: Reach in pixels of the correction (`border_correction`) by which the generated pixels first
            meet the given ones at the border; 0 for none. Default: 0.
        feather: Number of pixels inside the hole over which the given image blends into the generated one.
            Default: 0.

    Raises:
        ValueError: If `seam` or `feather` is negative.
    """
    check_border(seam, feather)
    # twice: neighbors along the border smooth each other's correction, which leaves a part of large steps
    for _ in range(2 if seam > 0 else 0):
        made = torch.where(hole > 0, (made + border_correction(made, given, hole, seam)).clamp(0, 1), given)
    weight = feather_weights(hole, feather)
    return torch.where(weight > 0, given + weight * (made - given) if feather else made, given)


def check_border(seam: float, feather: int) -> None:
    """Raise ValueError unless `seam` is a finite number and `feather` a whole number, both at least 0."""
    if not (seam == 0 or 1e-6 <= seam < float("inf")):  # less is no reach, and 1/seam² would overflow
        raise ValueError(f"seam: expected a number of pixels, at least 0, got {seam!r}")
    if not isinstance(feather, int) or feather < 0:
        raise ValueError(f"feather: expected a whole number of pixels, at least 0, got {feather!r}")


def feather_weights(hole: Tensor, feather: int) -> Tensor:
    """Return blending weights (B, 1, H, W) of a hole.

    They rise from 1 / (feather + 1) at the border to 1 at `feather` pixels inside, and are 0 outside.
    """
    total, known = hole, 1 - hole
    for _ in range(feather):
        if bool(known.all()):
            break  # deeper than the hole
        known = F.max_pool2d(known, 3, stride=1, padding=1)
        total = total + (1 - known)
    return total / (feather + 1)


def border_correction(made: Tensor, given: Tensor, hole: Tensor, reach: float) -> Tensor:
    """Return what to add to generated pixels so that they meet the given ones at the border of the hole.

    It solves (∇² − 1/reach²) c = 0 in the hole by conjugate gradients, with c = given − made at the border
    and zero slope at the edge of the canvas: Poisson image editing (Pérez et al. 2003, eq. 4) with screening.
    The step across the border becomes the one in the generated image. Where that is larger than the steps
    inside the given image (`border_limit`), it is reduced to their size: an edge exactly at the border would
    look like a seam.

    Args:
        made: The generated images, shape (B, C, H, W).
        given: The given images, shape (B, C, H, W).
        hole: Shape (B or 1, 1, H, W), 1 in the hole.
        reach: Distance in pixels over which the correction fades by a factor e, above 0.

    Returns:
        The correction, shape (B, C, H, W), 0 outside the hole.
    """
    b, c, h, w = torch.broadcast_shapes(made.shape, given.shape)
    kernel = FOUR_NEIGHBORS.to(made)

    def sum_of_neighbors(x: Tensor) -> Tensor:
        return F.conv2d(x.reshape(-1, 1, h, w), kernel, padding=1).view(x.shape)

    inside = hole.expand(b, c, h, w)
    diagonal = sum_of_neighbors(torch.ones_like(inside)) + reach**-2

    def operator(x: Tensor) -> Tensor:
        return inside * (diagonal * x - sum_of_neighbors(x))

    x, residual = torch.zeros_like(inside), torch.zeros_like(inside)
    for dim in (-1, -2):
        limit = border_limit(given, hole, dim)
        for sign in (1, -1):
            known, made_beside, given_beside = (shift(part, dim, sign) for part in (1 - hole, made, given))
            step = made - made_beside
            size = step.abs().mean(1, keepdim=True).clamp_min(torch.finfo(step.dtype).tiny)
            kept = (limit / size).clamp_max(1)  # fraction of the step that remains
            residual = residual + inside * known * (given_beside + kept * step - made)
    direction, energy = residual, residual.square().sum()
    tolerance = 1e-10 * energy
    for _ in range(10 * (h + w)):
        if energy <= tolerance:
            break
        along = operator(direction)
        step = energy / (direction * along).sum()
        x, residual = x + step * direction, residual - step * along
        before, energy = energy, residual.square().sum()
        direction = residual + energy / before * direction
    return x


def border_limit(given: Tensor, hole: Tensor, dim: int) -> Tensor:
    """Return the largest step allowed across the border, shape (B, 1, 1, 1), a mean over channels.

    It is three quarters (the correction fades with every pixel) of the 95th percentile of the steps between
    known neighbors along an axis. It is infinite if there are none, or if the percentile is below 1/255: a
    flat image does not forbid edges.

    Args:
        given: The given images, shape (B, C, H, W).
        hole: Shape (B or 1, 1, H, W), 1 in the hole.
        dim: The axis, -1 (horizontal) or -2 (vertical).
    """
    unlimited = given.new_tensor(float("inf"))
    if given.shape[dim] < 2:
        return unlimited.expand(len(given), 1, 1, 1)
    steps = given.diff(dim=dim).abs().mean(1).flatten(1)  # (B, number of pairs of neighbors)
    known = (1 - hole).unfold(dim, 2, 1).amin(-1).flatten(1) > 0  # both of a pair
    limits = []
    for image_steps, image_known in zip(*torch.broadcast_tensors(steps, known), strict=True):
        inner = image_steps[image_known]
        percentile = inner.kthvalue(math.ceil(0.95 * len(inner))).values if len(inner) else unlimited
        limits.append(0.75 * percentile if percentile > 1 / 255 else unlimited)
    return torch.stack(limits).view(-1, 1, 1, 1)


def shift(x: Tensor, dim: int, sign: int) -> Tensor:
    """Return the previous (1) or next (-1) neighbor of each position along an axis; 0 beyond the edge."""
    return F.pad(x, (sign, -sign) if dim == -1 else (0, 0, sign, -sign))
