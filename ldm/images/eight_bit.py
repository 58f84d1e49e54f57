"""PIL images of every mode as 8-bit RGB or RGBA."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
GRAY_MODES = ("1", "L", "I", "F", *SIXTEEN_BIT_MODES)
COLOR_MODES = ("CMYK", "YCbCr", "LAB", "HSV")  # in which PIL knows no transparency


def eight_bit(image: Image) -> Image:
    """Return a PIL image as RGBA if it has transparency, else as RGB.

    Gray, palette, CMYK and other color modes are converted; 16-bit values are scaled to 8 bits.

    Raises:
        ValueError: If the range of the values is unknown (floats, or 32-bit values beyond 16 bits).
    """
    from PIL import Image

    if image.mode in (*SIXTEEN_BIT_MODES, "I", "F"):
        return Image.fromarray(eight_bit_values(image)).convert("RGB")
    transparent = image.has_transparency_data and image.mode not in COLOR_MODES
    return image.convert("RGBA" if transparent else "RGB")


def eight_bit_values(image: Image) -> np.ndarray:
    """Return a gray image (H, W) with whole values in [0, 65535], scaled to uint8 and rounded to nearest."""
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F":
        raise ValueError("the range of floating-point pixels is unknown; pass a tensor with values in [0, 1]")
    values = values.astype(np.int32)
    if values.size and not 0 <= values.min() <= values.max() <= 65_535:
        raise ValueError(f"expected 16-bit values, 0 to 65535, got {values.min()} to {values.max()}")
    return ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 · 257
