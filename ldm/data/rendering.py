"""Rendering: scenes as pixels.

Colours are blended as x·alpha + background·(1 − alpha) on sRGB values. An image is tilted and resized with
its colours multiplied by alpha; at its own size on whole pixels it is blended exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ldm.data.layout import Placement, Scene
from ldm.data.palette import PALETTE
from ldm.data.recolouring import recolour

Area = Literal["first", "second", "background"]
THING_AREAS: tuple[Area, Area] = ("first", "second")


def render(scene: Scene, images: np.ndarray, size: int = 128) -> np.ndarray:
    """Render a scene.

    Args:
        scene: The scene.
        images: The images of the data set, (N, P, P, 4) uint8 RGBA with straight alpha.
        size: Side in pixels, at least 8. Default: 128.

    Returns:
        The rendered image, (size, size, 3) uint8 sRGB.

    Raises:
        ValueError: If the size is below 8.
    """
    return render_batch([scene], images, size)[0]


def render_batch(scenes: Sequence[Scene], images: np.ndarray, size: int = 128) -> np.ndarray:
    """Render several scenes, (B, size, size, 3) uint8; see `render`."""
    if size < 8:
        raise ValueError(f"size {size}: expected at least 8 pixels")
    out = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    for canvas, scene in zip(out, scenes, strict=True):
        canvas[:] = PALETTE[scene.facts.background or "white"]
        for placement in scene.placements:
            colour = scene.facts.things[placement.thing].colour
            image = images[placement.row]
            _draw(canvas, image if colour is None else recolour(image, colour), placement)
    return out


def coverage(scene: Scene, images: np.ndarray, size: int = 128) -> dict[Area, np.ndarray]:
    """Compute how much of each pixel shows the first thing, the second thing, and the background.

    Args:
        scene: The scene; its things do not overlap.
        images: The images of the data set, (N, P, P, 4) uint8 RGBA.
        size: Side in pixels, at least 8. Default: 128.

    Returns:
        For each area present, (size, size) float32 in [0, 1]; the areas of a pixel sum to 1.
    """
    found: dict[Area, np.ndarray] = {}
    background = np.ones((size, size), dtype=np.float32)
    for area, thing in zip(THING_AREAS, range(len(scene.facts.things)), strict=False):
        canvas = np.zeros((size, size, 3), dtype=np.uint8)
        for placement in scene.placements:
            if placement.thing == thing:
                white = images[placement.row].copy()
                white[..., :3] = 255
                _draw(canvas, white, placement)
        found[area] = canvas[..., 0] / np.float32(255)
        background -= found[area]
    return {**found, "background": background}


def _draw(canvas: np.ndarray, image: np.ndarray, placement: Placement) -> None:
    """Blend an image (P, P, 4) onto a canvas (S, S, 3), in place."""
    size = len(canvas)
    part, top, left = _placed(image, placement, size)
    height, width = part.shape[:2]
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + height, size), min(left + width, size)
    part, under = part[y0 - top : y1 - top, x0 - left : x1 - left], canvas[y0:y1, x0:x1]
    clear = np.uint16(255) - part[..., 3]
    for channel in range(3):  # plane by plane: NumPy is fastest on long inner loops
        mixed = part[..., channel] + under[..., channel] * clear  # at most 255² = 65,025: fits 16 bits
        # x/255 rounded, exactly, for x up to 255²: y = x + 128; (y + y/256) / 256
        mixed += np.uint16(128)
        mixed += mixed >> np.uint16(8)
        mixed >>= np.uint16(8)
        under[..., channel] = mixed


def _placed(image: np.ndarray, placement: Placement, size: int) -> tuple[np.ndarray, int, int]:
    """Return an image as a placement has it on a canvas, and the row and the column of its first pixel.

    The image is uint16: alpha in 0 to 255, and the colours times alpha.
    """
    from PIL import Image

    own, side = len(image), placement.side * size
    top, left = (centre * size - side / 2 for centre in (placement.y, placement.x))
    if side == own and top == int(top) and left == int(left) and not placement.tilt:
        alpha = image[..., 3:].astype(np.uint16)
        return np.concatenate([image[..., :3] * alpha, alpha], axis=-1), int(top), int(left)
    source = Image.fromarray(image).convert("RGBa")  # colours times alpha
    border = int(np.ceil(own / side)) + 1  # source pixels of a canvas pixel: so much is transparent all round
    if placement.tilt:
        border += int(np.ceil(own * np.sin(np.radians(abs(placement.tilt))) / 2))
    wide = Image.new("RGBa", (own + 2 * border,) * 2)
    wide.paste(source, (border, border))
    if placement.tilt:
        wide = wide.rotate(placement.tilt, resample=Image.Resampling.BICUBIC)
    # the canvas pixels that lie in the image with its border, and their box in the source
    step, middle, reach = own / side, wide.width / 2, side / own * wide.width / 2
    x0, y0 = (int(np.ceil(centre * size - reach)) for centre in (placement.x, placement.y))
    x1, y1 = (int(np.floor(centre * size + reach)) for centre in (placement.x, placement.y))
    left, right = (middle + (edge - placement.x * size) * step for edge in (x0, x1))
    upper, lower = (middle + (edge - placement.y * size) * step for edge in (y0, y1))
    box = (max(left, 0.0), max(upper, 0.0), min(right, wide.width), min(lower, wide.height))  # rounding
    small = np.array(wide.resize((x1 - x0, y1 - y0), Image.Resampling.HAMMING, box=box), dtype=np.uint16)
    colours, alpha = small[..., :3], small[..., 3:]
    np.minimum(colours, alpha, out=colours)  # a bicubic overshoots
    colours *= np.uint16(255)
    return small, y0, x0
