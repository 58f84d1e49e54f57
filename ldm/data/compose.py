"""Composition: images with an alpha channel on a background, varied in ways that a caption can describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ldm.data.palette import PALETTE
from ldm.support.config import nearest

SizeWord = Literal["full", "small"]
Place = Literal[
    "centre", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right"
]
Area = Literal["first", "second", "background"]
IMAGE_AREAS: tuple[Area, Area] = ("first", "second")
SIZES: tuple[SizeWord, ...] = get_args(SizeWord)
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The content of a training image. The defaults give a source image at full size, centred, on white.

    Args:
        image: Row of the image in the index.
        second: Row of a second image, or None. The two stand side by side, each at half size, `image` on the
            left. Default: None.
        background: A colour of the palette, or None for white that the caption does not mention.
            Default: None.
        size: "small" halves width and height. Default: "full".
        place: Where a small image stands. Default: "centre".

    Raises:
        ValueError: For a value that is not among the choices, a place for an image at full size, or a size
            for two images.
    """

    image: int
    second: int | None = None
    background: str | None = None
    size: SizeWord = "full"
    place: Place = "centre"

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("background", self.background, (None, *PALETTE)),
            ("size", self.size, SIZES),
            ("place", self.place, PLACES),
        ):
            if value not in choices:
                raise ValueError(f"{field} {value!r}; {nearest(value, choices)}")
        if self.place != "centre" and self.size != "small":
            raise ValueError(
                f"place {self.place!r}: only a small image can stand off the centre, got size {self.size!r}"
            )
        if self.second is not None and self.size != "full":
            raise ValueError(f"size {self.size!r}: expected 'full' for two images side by side")


def render(composition: Composition, images: np.ndarray, size: int = 128) -> np.ndarray:
    """Render a composition.

    Colours are blended as x·alpha + background·(1 − alpha) on sRGB values and rounded once. A smaller size is
    the mean over boxes.

    Args:
        composition: The composition.
        images: The images of the data set, (N, P, P, 4) uint8 RGBA with straight alpha.
        size: Side in pixels: P, or an even divisor of P. Default: 128.

    Returns:
        The rendered image, (size, size, 3) uint8 sRGB.

    Raises:
        ValueError: If P is not a multiple of `size`.
    """
    return render_batch([composition], images, size)[0]


def render_batch(compositions: Sequence[Composition], images: np.ndarray, size: int = 128) -> np.ndarray:
    """Render several compositions, (B, size, size, 3) uint8; see `render`."""
    _check_size(size, images)
    out = np.empty((len(compositions), size, size, 3), dtype=np.uint8)
    for canvas, composition in zip(out, compositions, strict=True):
        _draw(canvas, composition, images)
    return out


def coverage(composition: Composition, images: np.ndarray, size: int = 128) -> dict[Area, np.ndarray]:
    """Compute how much of each pixel shows the first image, the second image, and the background.

    Args:
        composition: The composition.
        images: The images of the data set, (N, P, P, 4) uint8 RGBA.
        size: Side in pixels: P, or an even divisor of P. Default: 128.

    Returns:
        For each area present, (size, size) float32 in [0, 1]; the areas of a pixel sum to 1.

    Raises:
        ValueError: If P is not a multiple of `size`.
    """
    _check_size(size, images)
    found: dict[Area, np.ndarray] = {}
    background = np.ones((size, size), dtype=np.float32)
    for area, (row, top, left, shrink) in zip(IMAGE_AREAS, _placements(composition, size), strict=False):
        white = images[row].copy()
        white[..., :3] = 255
        side = size // shrink
        found[area] = np.zeros((size, size), dtype=np.float32)
        found[area][top : top + side, left : left + side] = _blend(
            white, (0, 0, 0), shrink * images.shape[1] // size
        )[..., 0] / np.float32(255)
    for shown in found.values():
        background -= shown
    return {**found, "background": background}


def _check_size(size: int, images: np.ndarray) -> None:
    side = images.shape[1]
    if size < 1 or side % size or (side // size > 1 and size % 2):
        raise ValueError(f"size {size}: expected an even divisor of the images' {side} pixels")


def _draw(canvas: np.ndarray, composition: Composition, images: np.ndarray) -> None:
    size, background = len(canvas), PALETTE[composition.background or "white"]
    canvas[:] = background
    for row, top, left, shrink in _placements(composition, size):
        side = size // shrink
        canvas[top : top + side, left : left + side] = _blend(
            images[row], background, shrink * images.shape[1] // size
        )


def _placements(composition: Composition, size: int) -> list[tuple[int, int, int, int]]:
    """Return for each image its row, its (top, left) pixel, and the factor by which it is reduced."""
    if composition.second is not None:
        top = (size - size // 2) // 2
        return [(composition.image, top, 0, 2), (composition.second, top, size // 2, 2)]
    if composition.size == "small":
        return [(composition.image, *corner_of(composition.place, size), 2)]
    return [(composition.image, 0, 0, 1)]


def corner_of(place: Place, size: int) -> tuple[int, int]:
    """Return the (top, left) pixel of a small image, size/2 wide, on a canvas of `size` pixels."""
    half, margin = size // 2, size // 32
    centre, far = (size - half) // 2, size - half - margin
    top = margin if place.startswith("top") else far if place.startswith("bottom") else centre
    left = margin if place.endswith("left") else far if place.endswith("right") else centre
    return top, left


def _blend(rgba: np.ndarray, background: tuple[int, int, int], factor: int) -> np.ndarray:
    """Blend (P, P, 4) uint8 RGBA onto a colour and reduce it: (P/factor, P/factor, 3) uint8, rounded once."""
    alpha = rgba[..., 3].astype(np.uint16)
    clear = np.uint16(255) - alpha
    side = len(rgba) // factor
    out = np.empty((side, side, 3), dtype=np.uint8)
    for channel, colour in enumerate(background):  # plane by plane: NumPy is fastest on long inner loops
        mixed = rgba[..., channel] * alpha  # at most 255² = 65,025: fits 16 bits
        mixed += clear * np.uint16(colour)
        if factor == 1:
            # x/255 rounded, exactly, for x up to 255²: y = x + 128; (y + y/256) / 256
            mixed += np.uint16(128)
            mixed += mixed >> np.uint16(8)
            mixed >>= np.uint16(8)
            out[..., channel] = mixed
        else:
            total = np.zeros((side, side), dtype=np.uint32)
            for row in range(factor):
                for column in range(factor):
                    total += mixed[row::factor, column::factor]
            weight = 255 * factor * factor
            out[..., channel] = (total + weight // 2) // weight
    return out
