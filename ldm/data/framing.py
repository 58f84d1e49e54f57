"""Frames of images: resized until a frame of the wanted size is covered, then cropped.

An image (h, w) is scaled by s = max(H / h, W / w) for a frame (H, W), and what exceeds the frame along one
side is cropped at a place in [0, 1], where 0.5 is the center. With aspect-ratio buckets, the frame is the
bucket whose ratio is nearest, so that little is cropped (Podell et al. 2023, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ldm.support.config import check_between

if TYPE_CHECKING:
    from PIL.Image import Image


class Frame(NamedTuple):
    """A frame of an image.

    Attributes:
        height: H in pixels.
        width: W in pixels.
        place: Where along the longer side the image is cropped, in [0, 1]; 0 is the top or the left.
        mirrored: Whether the crop is mirrored.
    """

    height: int
    width: int
    place: float = 0.5
    mirrored: bool = False


class SizeRecord(NamedTuple):
    """The size conditions of SDXL (Podell et al. 2023, section 2.2), each (height, width) or (top, left).

    Attributes:
        original: Size of the image before it was resized.
        crop: Corner of the crop in the resized image.
        target: Size of the crop.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Aspect-ratio buckets: all sizes whose sides are multiples of `step`, of at most size² pixels.

    Args:
        step: What the sides are multiples of, in pixels; at least the autoencoder's factor. Default: 64.
        ratio: Largest ratio of the sides, at least 1. Default: 2.
    """

    step: int = 64
    ratio: float = 2.0

    def __post_init__(self) -> None:
        check_between(1, 1024, step=self.step)
        if not 1 <= self.ratio <= 16:
            raise ValueError(f"ratio: expected 1 to 16, got {self.ratio}")

    def sizes(self, size: int) -> list[tuple[int, int]]:
        """Return the sizes (H, W), from tall to wide; for each width the largest height that fits.

        Raises:
            ValueError: If none fits.
        """
        found = set()
        for width in range(self.step, math.ceil(size * self.ratio) + 1, self.step):
            height = size * size // width // self.step * self.step
            if height and max(height / width, width / height) <= self.ratio:
                found.add((height, width))
        # of several widths of one height, the widest
        widest = {height: max(w for h, w in found if h == height) for height, _ in found}
        if not widest:
            raise ValueError(f"buckets: no size of at most {size}² pixels in steps of {self.step}")
        return sorted(widest.items(), key=lambda pair: pair[1] / pair[0])


def nearest_bucket(heights: np.ndarray, widths: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return for each image the number of the size whose ratio of sides is nearest, (N,) int.

    Args:
        heights: (N,) in pixels.
        widths: (N,) in pixels.
        sizes: The sizes (H, W).
    """
    wanted = np.log([w / h for h, w in sizes])
    ratios = np.log(widths / heights)
    return np.abs(ratios[:, None] - wanted).argmin(1)


def size_record(height: int, width: int, frame: Frame) -> SizeRecord:
    """Return the size conditions of an image (height, width) in a frame.

    Those of a mirrored crop are those of the same crop of the mirrored image.
    """
    scale = max(frame.height / height, frame.width / width)
    top, left = height * scale - frame.height, width * scale - frame.width
    across = 1 - frame.place if frame.mirrored else frame.place
    return SizeRecord(
        original=(height, width),
        crop=(round(frame.place * top), round(across * left)),
        target=(frame.height, frame.width),
    )


def crop_to_frame(image: Image, frame: Frame) -> np.ndarray:
    """Resize and crop an image (bicubic) to (H, W, 3) uint8.

    Args:
        image: The image, RGB.
        frame: The frame.
    """
    from PIL import Image

    if image.size != (frame.width, frame.height):
        scale = max(frame.height / image.height, frame.width / image.width)
        h, w = frame.height / scale, frame.width / scale  # of the crop, in pixels of the image
        top, left = frame.place * (image.height - h), frame.place * (image.width - w)
        box = (left, top, min(left + w, image.width), min(top + h, image.height))
        image = image.resize((frame.width, frame.height), Image.Resampling.BICUBIC, box=box)
    if frame.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)
