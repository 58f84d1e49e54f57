"""Image files, opened within limits: known formats, and a largest number of pixels, checked before decoding.

A file of some kilobytes can hold an image of gigabytes. Its size is read from its header, and an image of
more than `MAX_PIXELS` pixels is refused before any of them is decoded. The same limit holds for images in
memory and for images to be made. The environment variable `LDM_MAX_PIXELS` sets another one; Pillow's own,
`PIL.Image.MAX_IMAGE_PIXELS` (files of more than twice as many are refused), stays.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ldm.support.files import BoundedFile, file_exists
from ldm.support.text import escaped, shown
from ldm.support.warn import warn_user

if TYPE_CHECKING:
    from PIL.Image import Image

Decoded = TypeVar("Decoded")
READ_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")  # names in PIL
MAX_PIXELS = 2**26  # 8192 × 8192
MAX_PIXELS_VARIABLE = "LDM_MAX_PIXELS"


def max_pixels() -> int:
    """Return the largest number of pixels of an image: `LDM_MAX_PIXELS` if it is set, else `MAX_PIXELS`.

    Raises:
        ValueError: If the variable is not a positive whole number.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    if not text:
        return MAX_PIXELS
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) > 0):
        raise ValueError(f"{MAX_PIXELS_VARIABLE}: expected a positive whole number, got {shown(text)}")
    return int(text)


def check_pixels(width: int, height: int, name: str = "") -> None:
    """Raise ValueError, which begins with `name`, for an image of more than `max_pixels()` pixels."""
    if width * height > (most := max_pixels()):
        raise ValueError(
            f"{name and name + ': '}{width}×{height} is {width * height} pixels, expected at most {most};"
            f" {MAX_PIXELS_VARIABLE} sets another limit"
        )


def decode_image(
    path: str | Path | bytes,
    use: Callable[[Image], Decoded],
    *,
    name: str = "image",
    formats: Sequence[str] = READ_FORMATS,
) -> Decoded:
    """Open an image file and return what `use` makes of it.

    Args:
        path: The file, or its content. Of several images (frames, pages) the first is opened, with a warning;
            the others of a JPEG are previews, so there is none for them.
        use: Decodes the image, which is open while it runs.
        name: Name of the argument, for messages. Default: "image".
        formats: Formats to accept, by their names in PIL. Default: `READ_FORMATS`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not an image in one of the formats, has too many pixels, or is damaged.
    """
    from PIL import Image

    where, source = f"{name}: the content", io.BytesIO(path) if isinstance(path, bytes) else Path(path)
    if isinstance(source, Path):
        where = f"{name}: {shown(str(source))}"
        if not file_exists(source):
            raise FileNotFoundError(f"{name}: no such file: {shown(str(source))}")
    try:
        with (
            BoundedFile(source) if isinstance(source, Path) else source as file,
            Image.open(file, formats=tuple(formats)) as image,
        ):
            check_pixels(*image.size)
            # counting the pages of a TIFF takes a time that grows with their square
            if image.format != "MPO" and getattr(image, "is_animated", False):
                warn_user(f"{where} holds several images; the first is used")
            return use(image)
    except Exception as error:  # decoders raise errors of every class
        reason = escaped(str(error) or type(error).__name__, 300)
        raise ValueError(f"{where} is not a readable image: {reason}") from None
