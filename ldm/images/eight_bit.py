"""Pictures of every kind that files hold, as 8-bit RGBA, upright."""

from __future__ import annotations

from typing import Any

SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")


def rgba(image: Any) -> Any:
    """A PIL image as RGBA, turned as its EXIF data says; grey, palettes, CMYK and other colour spaces are
    converted, 16 bits scaled to 8.

    ValueError for numbers whose range is not known (32-bit ones beyond 16 bits, and floats).
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN or image.mode in ("I", "F"):
        return Image.fromarray(_scaled(image), mode="L").convert("RGBA")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return image.convert("RGBA")


def _scaled(image: Any) -> Any:
    """Grey of 16 bits, or of whole numbers within them, in 8 bits."""
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F":
        raise ValueError(
            "image: a picture of floating-point numbers does not say its range; give a tensor in [0, 1]"
        )
    values = values.astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65_535:
        raise ValueError(
            f"image: expected numbers of 16 bits, 0 to 65535, got {values.min()} to {values.max()}"
        )
    return ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 · 257, rounded
