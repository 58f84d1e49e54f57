"""Image files as upright 8-bit RGB, read within the limits of `ldm.images.opening`."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ldm.images.opening import READ_FORMATS, check_pixels
from ldm.images.pixels import convert_mode
from ldm.support.text import escaped

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # tag of EXIF
METADATA_KEYS = {"exif", "xmp"}  # which can state an orientation
EMPTY = "it is empty"
TURNED = (5, 6, 7, 8)  # orientations that exchange the sides
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FIRST_BYTES = 4096
SHARPNESS = 2  # times the wanted side that a reduced JPEG has at least


class Header(NamedTuple):
    """What the header of an image file states.

    Attributes:
        height: Height in pixels, upright.
        width: Width in pixels, upright.
        frames: Whether there are several frames.
        head: Hash of the first `FIRST_BYTES` bytes; files of one content have the same.
    """

    height: int
    width: int
    frames: bool
    head: str


def image_header(file: BinaryIO) -> Header:
    """Return what the header of an image file states, without decoding its pixels.

    Raises:
        TooManyPixels: If the image has more pixels than `ldm.images.opening.max_pixels` permits.
        ValueError: If the file is not an image in one of `READ_FORMATS`.
    """
    from PIL import Image

    first = file.read(FIRST_BYTES)
    if not first:
        raise ValueError(EMPTY)
    head = hashlib.sha256(first).hexdigest()[:16]
    file.seek(0)
    try:
        with Image.open(file, formats=READ_FORMATS) as image:
            width, height = image.size
            frames = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            turned = _orientation(image) in TURNED
    except Image.DecompressionBombError as error:
        raise TooManyPixels(escaped(error, 300)) from None
    except Exception as error:  # decoders raise errors of every class
        raise ValueError(_reason(error)) from None
    check_side_pixels(width, height)
    return Header(width, height, frames, head) if turned else Header(height, width, frames, head)


def check_side_pixels(width: int, height: int) -> None:
    """Raise TooManyPixels for an image of more pixels than `ldm.images.opening.max_pixels` permits."""
    try:
        check_pixels(width, height)
    except ValueError as error:
        raise TooManyPixels(str(error)) from None


class TooManyPixels(ValueError):
    """An image that is too large to be decoded."""


def _orientation(image: Image) -> int:
    """Return the EXIF orientation of an image, 1 if it has none or only behind its pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # looking further would decode it
    if image.format == "JPEG" and not METADATA_KEYS & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # malformed EXIF, for which PIL raises errors of many classes; decoding ignores it too
        return 1


def decode(data: bytes, background: tuple[int, int, int], least: int | None = None) -> Image:
    """Decode an image file to 8-bit RGB.

    It is turned as its EXIF orientation says. Gray, palette, CMYK and 16-bit images are converted; of several
    frames the first is used.

    Args:
        data: The file.
        background: Color on which transparent images are composited.
        least: Side that is needed; a JPEG of more than twice this side may be reduced while it is decoded.
            None for the file's own size. Default: None.

    Raises:
        ValueError: If the file is not an image, has too many pixels, or is damaged.
    """
    from PIL import Image as pil

    upright: Image
    try:
        with pil.open(io.BytesIO(data), formats=READ_FORMATS) as image:
            check_pixels(*image.size)
            if least is not None and image.format == "JPEG":
                image.draft(None, (SHARPNESS * least, SHARPNESS * least))
            if image.format == "JPEG" and image.mode == "RGB" and not METADATA_KEYS & image.info.keys():
                image.load()
                upright = image
            else:
                upright = on_background(convert_mode(image, "image"), background)
    except Exception as error:  # decoders raise errors of every class
        raise ValueError(_reason(error) if data else EMPTY) from None
    return upright


def on_background(image: Image, background: tuple[int, int, int]) -> Image:
    """Return an RGB or RGBA image as RGB, composited on a color."""
    from PIL import Image

    if image.mode != "RGBA":
        return image
    below = Image.new("RGB", image.size, background)
    below.paste(image, mask=image.getchannel("A"))
    return below


def _reason(error: Exception) -> str:
    """Return in a few words why a file cannot be read."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or damaged from the start"
    return escaped(str(error) or type(error).__name__, 300)
