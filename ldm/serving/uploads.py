"""Images in requests: decoded within limits, with what their transparency says."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.images.eight_bit import eight_bit
from ldm.images.opening import decode_image
from ldm.serving.errors import ApiError, bad_field
from ldm.serving.fields import LONGEST_SIDE_OUT

if TYPE_CHECKING:
    from PIL.Image import Image

UPLOADED = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 4096 * 4096  # of an image in a request


def uploaded_image(name: str, content: bytes) -> Image:
    """Return an image in a request, upright, as 8-bit RGB, or RGBA if it has transparency.

    Args:
        name: Name of its field.
        content: The file.

    Raises:
        ApiError: If it is empty, no image, has too many pixels, or is damaged.
    """
    from PIL import ImageOps

    if not content:
        raise bad_field(name, "expected an image file, got an empty one", "invalid_image")

    def decoded(opened: Image) -> Image:
        width, height = opened.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width}×{height} pixels, expected at most {MOST_PIXELS}")
        upright: Image = ImageOps.exif_transpose(opened)
        return eight_bit(upright)

    try:
        return decode_image(content, decoded, name=name, formats=UPLOADED)
    except ValueError as error:
        raise ApiError(400, str(error), param=name, code="invalid_image") from None


def base64_image(name: str, text: object) -> Image:
    """Return an image that JSON holds as base64, with or without the start of a data URL."""
    return uploaded_image(name, base64_content(name, text))


def base64_content(name: str, text: object) -> bytes:
    """Return the bytes that JSON holds as base64; ApiError for anything else."""
    if not isinstance(text, str):
        raise bad_field(name, "expected an image in base64", "invalid_type")
    start, comma, rest = text[:100].partition(",")
    if comma and start.startswith("data:"):
        text = text[len(start) + 1 :]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_field(name, "expected an image in base64", "invalid_image") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceImage:
    """The image that a request starts from.

    Attributes:
        image: The image, 8-bit RGB; what is transparent is white.
        hole: Its size, 255 where it is repainted (mode "L"). None: everywhere.
    """

    image: Image
    hole: Image | None = None


def source_of(image: Image, mask: Image | None = None) -> SourceImage:
    """Return the source that an image and its mask make, as OpenAI's edits read them.

    The mask's transparent pixels are repainted; without a mask, those of the image. What is longer than
    `LONGEST_SIDE_OUT` is reduced to that.

    Raises:
        ApiError: If the mask has another size than the image, or no transparent pixels.
    """
    hole = None
    if mask is not None:
        if mask.size != image.size:
            expected, got = (f"{each.width}×{each.height}" for each in (image, mask))
            raise bad_field("mask", f"expected the image's size {expected}, got {got}", "invalid_image_size")
        hole = transparent_part(mask)
        if hole is None:
            raise bad_field(
                "mask",
                "it has no transparent pixels, which mark what is repainted (an alpha channel of 0)",
                "invalid_mask",
            )
    else:
        hole = transparent_part(image)
    return reduced(SourceImage(image=opaque(image), hole=hole))


def reduced(source: SourceImage) -> SourceImage:
    """Return a source whose sides have at most `LONGEST_SIDE_OUT` pixels, as images that are made have."""
    from PIL import Image as pil

    width, height = source.image.size
    scale = LONGEST_SIDE_OUT / max(width, height)
    if scale >= 1:
        return source
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    hole = None
    if source.hole is not None:
        hole = source.hole.resize(size, pil.Resampling.BOX).point(
            [255 if value else 0 for value in range(256)]
        )
    return SourceImage(image=source.image.resize(size, pil.Resampling.LANCZOS), hole=hole)


def transparent_part(image: Image) -> Image | None:
    """Return a mask (mode "L"), 255 where an image is transparent by half or more; None if it is nowhere."""
    if image.mode != "RGBA":
        return None
    hole: Image = image.getchannel("A").point([255 if alpha < 128 else 0 for alpha in range(256)])
    return hole if hole.getbbox() is not None else None


def opaque(image: Image) -> Image:
    """Return an image as RGB, composited on white."""
    from PIL import Image as pil

    if image.mode != "RGBA":
        return image.convert("RGB")
    sheet = pil.new("RGB", image.size, "white")
    sheet.paste(image, mask=image.getchannel("A"))
    return sheet
