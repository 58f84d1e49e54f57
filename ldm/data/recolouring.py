"""Things in another colour, with their shape and shading.

With L the luminance of a pixel and c a colour of luminance l, both on sRGB values in [0, 1], the pixel
becomes c·L/l where L < l, and c + (1 − c)·(L − l)/(1 − l) elsewhere: black stays black, white stays white,
and the luminance of every pixel is preserved.
"""

from __future__ import annotations

import functools

import numpy as np

from ldm.data.palette import PALETTE, THING_COLOURS

LUMINANCE_WEIGHTS = (54, 183, 19)  # of red, green and blue in the luminance (BT.709), of 256
LUMINANCES = 255 * 256 + 1  # of the luminance
LEAST_CHROMA = 0.4  # a thing takes colours if it has at least this share of the chroma of each


def recolour(image: np.ndarray, colour: str) -> np.ndarray:
    """Return an image in one of the things' colours.

    Args:
        image: (..., 3) or (..., 4) uint8 sRGB; an alpha channel is kept as it is.
        colour: The name of the colour.

    Returns:
        The recoloured image, of the same shape, uint8.

    Raises:
        KeyError: If the colour is not in the palette.
    """
    out = np.array(image)
    out[..., :3] = _shades(PALETTE[colour])[_luminance(image)]
    return out


def takes_colour(image: np.ndarray) -> bool:
    """Return whether an image (H, W, 4) uint8 RGBA can be seen in colour: mostly neither black nor white."""
    weights = image[..., 3].ravel().astype(np.float64)
    histogram = np.bincount(_luminance(image).ravel(), weights, minlength=LUMINANCES)
    return bool((_chroma() @ histogram >= LEAST_CHROMA * max(weights.sum(), 1.0)).all())


def _luminance(image: np.ndarray) -> np.ndarray:
    """Return 256 times the luminance, 0 to 65280, of uint8 sRGB values."""
    red, green, blue = (image[..., i].astype(np.uint16) * np.uint16(LUMINANCE_WEIGHTS[i]) for i in range(3))
    return red + green + blue


@functools.cache
def _shades(rgb: tuple[int, int, int]) -> np.ndarray:
    """Return the colour of every luminance of `_luminance`, (65281, 3) uint8."""
    level = np.arange(LUMINANCES)[:, None] / (LUMINANCES - 1)  # (65281, 1)
    colour = np.array(rgb) / 255
    own = float(np.dot(colour, LUMINANCE_WEIGHTS)) / 256
    dark, light = colour * level / own, colour + (1 - colour) * (level - own) / (1 - own)
    return (np.where(level < own, dark, light) * 255).round().astype(np.uint8)


@functools.cache
def _chroma() -> np.ndarray:
    """Return the share of its chroma that each colour of things has at every luminance, (7, 65281)."""
    chroma = np.stack([np.ptp(_shades(PALETTE[colour]), axis=1) for colour in THING_COLOURS])
    return chroma / chroma.max(1, keepdims=True)
