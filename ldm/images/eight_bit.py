"""PIL images of every mode as upright 8-bit RGBA."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


def rgba(image: Image) -> Image:
    """Return a PIL image as RGBA, rotated as its EXIF orientation says.

    Gray, palette, CMYK and other color modes are converted; 16-bit values are scaled to 8 bits.

    Raises:
        ValueError: If the range of the values is unknown (floats, or 32-bit values beyond 16 bits).
    """
    from PIL import Image, ImageOps

    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode in (*SIXTEEN_BIT_MODES, "I", "F"):
        return Image.fromarray(eight_bit_values(upright)).convert("RGBA")
    if upright.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        upright = upright.convert("RGB")
    return upright.convert("RGBA")


def eight_bit_values(image: Image) -> np.ndarray:
    """Return a gray image (H, W) with whole values in [0, 65535], scaled to uint8 and rounded to nearest."""
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F":
        raise ValueError(
            "image: the range of floating-point pixels is unknown; pass a tensor with values in [0, 1]"
        )
    values = values.astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65_535:
        raise ValueError(f"image: expected 16-bit values, 0 to 65535, got {values.min()} to {values.max()}")
    return ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 · 257
