"""Composition: pictures with alpha laid on a ground, in a few ways that a caption can say."""

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
Area = Literal["first", "second", "ground"]
THINGS: tuple[Area, Area] = ("first", "second")
SIZES: tuple[SizeWord, ...] = get_args(SizeWord)
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What an image shows. The defaults are the source's own: one picture, full size, centred, on white
    unsaid.

    ``picture`` and ``second`` are rows of the index; with a second one, the two stand side by side
    (``picture`` on the left), each at half size. ``ground`` is a colour of the palette, or None for white
    that the caption leaves out. A ``small`` picture has half the width and half the height, and may have a
    ``place`` other than the centre.
    """

    picture: int
    second: int | None = None
    ground: str | None = None
    size: SizeWord = "full"
    place: Place = "centre"

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("ground", self.ground, (None, *PALETTE)),
            ("size", self.size, SIZES),
            ("place", self.place, PLACES),
        ):
            if value not in choices:
                raise ValueError(f"{field} {value!r}; {nearest(value, choices)}")
        if self.place != "centre" and self.size != "small":
            raise ValueError(
                f"place {self.place!r}: only a small picture can be placed off the centre, got size"
                f" {self.size!r}"
            )
        if self.second is not None and self.size != "full":
            raise ValueError("two pictures side by side have a size of their own: leave size at 'full'")


def render(composition: Composition, pictures: np.ndarray, size: int = 128) -> np.ndarray:
    """The image of a composition, (size, size, 3) uint8 sRGB, from pictures (N, P, P, 4) uint8 RGBA with
    straight alpha.

    ``size``: P, or an even divisor of it (ValueError otherwise); smaller images are means over boxes.
    Blending is x·alpha + ground·(1 − alpha) on sRGB values, rounded once.
    """
    return render_batch([composition], pictures, size)[0]


def render_batch(compositions: Sequence[Composition], pictures: np.ndarray, size: int = 128) -> np.ndarray:
    """The images of several compositions, (B, size, size, 3) uint8; see ``render``."""
    _check_size(size, pictures)
    out = np.empty((len(compositions), size, size, 3), dtype=np.uint8)
    for image, composition in zip(out, compositions, strict=True):
        _draw(image, composition, pictures)
    return out


def areas(composition: Composition, pictures: np.ndarray, size: int = 128) -> dict[Area, np.ndarray]:
    """How much of each pixel of a composition's image is the first picture, the second where there is one,
    and the ground: each (size, size) float32 in [0, 1], together 1. Arguments and errors as of ``render``."""
    _check_size(size, pictures)
    shown = {}
    for area, (row, top, left, shrink) in zip(THINGS, _placed(composition, size), strict=False):
        white = pictures[row].copy()
        white[..., :3] = 255
        side = size // shrink
        shown[area] = np.zeros((size, size), dtype=np.float32)
        shown[area][top : top + side, left : left + side] = _blend(
            white, (0, 0, 0), shrink * pictures.shape[1] // size
        )[..., 0] / np.float32(255)
    return {**shown, "ground": 1 - sum(shown.values())}


def _check_size(size: int, pictures: np.ndarray) -> None:
    side = pictures.shape[1]
    if size < 1 or side % size or (side // size > 1 and size % 2):
        raise ValueError(f"size {size}: expected an even divisor of the pictures' {side} pixels")


def _draw(image: np.ndarray, composition: Composition, pictures: np.ndarray) -> None:
    size, ground = len(image), PALETTE[composition.ground or "white"]
    image[:] = ground
    for row, top, left, shrink in _placed(composition, size):
        side = size // shrink
        image[top : top + side, left : left + side] = _blend(
            pictures[row], ground, shrink * pictures.shape[1] // size
        )


def _placed(composition: Composition, size: int) -> list[tuple[int, int, int, int]]:
    """Each picture of a composition: its row, its (top, left) pixel, and the factor by which it is smaller
    than the image."""
    if composition.second is not None:
        top = (size - size // 2) // 2
        return [(composition.picture, top, 0, 2), (composition.second, top, size // 2, 2)]
    if composition.size == "small":
        return [(composition.picture, *corner_of(composition.place, size), 2)]
    return [(composition.picture, 0, 0, 1)]


def corner_of(place: Place, size: int) -> tuple[int, int]:
    """The (top, left) pixel of a small picture, size/2 wide, in an image of this size."""
    half, margin = size // 2, size // 32
    centre, far = (size - half) // 2, size - half - margin
    top = margin if place.startswith("top") else far if place.startswith("bottom") else centre
    left = margin if place.endswith("left") else far if place.endswith("right") else centre
    return top, left


def _blend(rgba: np.ndarray, ground: tuple[int, int, int], factor: int) -> np.ndarray:
    """RGBA (P, P, 4) uint8 on a ground, made smaller by a whole factor: (P/factor, P/factor, 3) uint8,
    rounded to nearest."""
    alpha = rgba[..., 3].astype(np.uint16)
    clear = 255 - alpha
    side = len(rgba) // factor
    out = np.empty((side, side, 3), dtype=np.uint8)
    for channel, colour in enumerate(
        ground
    ):  # one plane at a time: long inner loops are what numpy is fast at
        mixed = rgba[..., channel] * alpha  # at most 255² = 65,025: fits 16 bits
        mixed += clear * np.uint16(colour)
        if factor == 1:
            mixed += 128  # x/255 rounded, exactly, for x up to 255²: y = x + 128; (y + y/256) / 256
            mixed += mixed >> 8
            mixed >>= 8
            out[..., channel] = mixed
        else:
            total = np.zeros((side, side), dtype=np.uint32)
            for row in range(factor):
                for column in range(factor):
                    total += mixed[row::factor, column::factor]
            weight = 255 * factor * factor
            out[..., channel] = (total + weight // 2) // weight
    return out
