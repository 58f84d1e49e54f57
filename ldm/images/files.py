"""Image files that carry their recipe: PNG, JPEG and WebP, and the checks made before sampling.

| suffix | format | recipe | pixels |
|---|---|---|---|
| `.png` | PNG | iTXt chunk "ldm", JSON | exact |
| `.jpg`, `.jpeg` | JPEG, no chroma subsampling | EXIF UserComment, JSON `{"ldm": recipe}` | lossy |
| `.webp` | WebP | EXIF UserComment, JSON `{"ldm": recipe}` | lossy |

A JPEG's EXIF data have at most 64 KiB. A longer recipe is written as comments (COM) of the JPEG, each of
which begins with "ldm k/n " and has the k-th of n parts of the recipe's JSON.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.images.opening import decode_image
from ldm.support.files import check_place, write_atomically
from ldm.support.scalars import whole_number
from ldm.support.strict_json import parse_json
from ldm.support.text import shown

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix → name in PIL
DEFAULT_QUALITY = 95  # default of the lossy formats
PNG_STRATEGY = 3
"""Z_RLE of zlib: a third of the default's time, for files 1 % smaller (emoji) to 9 % larger (sheets)."""
RECIPE_KEY = "ldm"  # name of the PNG text chunk
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286  # tags of EXIF 2.3
COMMENT_START = b'ASCII\0\0\0{"ldm": '  # the character code of a UserComment, and the JSON key
MAX_SEGMENT = 65_533  # bytes in one segment of a JPEG
COMMENT_PART = re.compile(rb"ldm ([0-9]{1,4})/([0-9]{1,4}) (.*)", re.DOTALL)  # k, n, and a part of a recipe
MAX_RECIPE_BYTES = 2**24  # of the JSON text
LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # pixels that the formats can hold


def check_writable(path: str | Path, suffixes: Collection[str] = tuple(FORMATS)) -> Path:
    """Return the path if a file with one of the suffixes can be written there.

    Raises:
        ValueError: If the suffix is not one of `suffixes`, or this build of Pillow cannot write WebP.
        OSError: If the path is a folder, its folder does not exist, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        *others, last = suffixes
        choices = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{str(path)!r}: expected a file name that ends in {choices}")
    if suffix == ".webp":
        from PIL import features

        if not features.check("webp"):
            raise ValueError(f"{str(path)!r}: this build of Pillow has no WebP; choose .png or .jpg")
    check_place(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, expected a file name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def check_quality(path: str | Path, quality: int | None) -> None:
    """Raise ValueError unless `quality` is None, or in [1, 100] for a file in a lossy format."""
    if quality is None:
        return
    if Path(path).suffix.lower() == ".png":
        raise ValueError(f"quality {quality}: {str(path)!r} is a PNG, which is lossless; leave quality out")
    whole_number("quality", quality, least=1, most=100)


def write_image(path: Path, image: Image, recipe: Mapping[str, Any], *, quality: int | None = None) -> None:
    """Write an image with its recipe in the format's own metadata, whole or not at all.

    Args:
        path: The file; its suffix selects the format (see `FORMATS`).
        image: The image, 8-bit RGB.
        recipe: The recipe, as JSON can hold it.
        quality: Quality of JPEG and WebP, from 1 to 100; PNG has none. Default: None, `DEFAULT_QUALITY`.

    Raises:
        ValueError: For another suffix, a quality out of range, an image with more pixels on a side than the
            format can hold, or a recipe of more than `MAX_RECIPE_BYTES`.
        OSError: If the file cannot be written.
    """
    check_writable(path)
    write_atomically(path, encode_image(path, image, recipe, quality=quality))


def encode_image(path: Path, image: Image, recipe: Mapping[str, Any], *, quality: int | None = None) -> bytes:
    """Return the content that `write_image` gives a file; its arguments and errors are those."""
    check_quality(path, quality)
    check_side(path, *image.size)
    name, buffer = FORMATS[path.suffix.lower()], io.BytesIO()
    text = json.dumps(recipe, ensure_ascii=name != "PNG")
    if len(text.encode()) > MAX_RECIPE_BYTES:
        raise ValueError(
            f"{str(path)!r}: the recipe has {len(text.encode())} bytes, expected at most {MAX_RECIPE_BYTES}"
        )
    if name == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt(RECIPE_KEY, text)
        image.save(buffer, format=name, pnginfo=info, compress_type=PNG_STRATEGY)
    else:
        level = DEFAULT_QUALITY if quality is None else int(quality)
        exif = exif_with_recipe(text)
        if name == "WEBP":
            image.save(buffer, format=name, exif=exif, quality=level)
        elif len(exif.tobytes()) <= MAX_SEGMENT:
            image.save(buffer, format=name, exif=exif, quality=level, subsampling=0)
        else:
            image.save(buffer, format=name, extra=comment_segments(text), quality=level, subsampling=0)
    return buffer.getvalue()


def check_side(path: str | Path, width: int, height: int) -> None:
    """Raise ValueError if the format of a file cannot hold an image of this size in pixels."""
    name = FORMATS.get(Path(path).suffix.lower(), "")
    most = LONGEST_SIDE.get(name)
    if most is not None and max(width, height) > most:
        raise ValueError(
            f"{str(path)!r}: {width}×{height} pixels, and a side in {name} has at most {most}; use .png, or"
            " write the images separately"
        )


def exif_with_recipe(text: str) -> Exif:
    """Return EXIF data whose UserComment is the JSON mapping `{"ldm": recipe}`, from a recipe's JSON text."""
    from PIL.Image import Exif

    exif = Exif()
    exif[EXIF_IFD] = {USER_COMMENT: COMMENT_START + text.encode("ascii") + b"}"}
    return exif


def comment_segments(text: str) -> bytes:
    """Return the comment segments of a JPEG that hold a text, which is ASCII, in parts."""
    content, size = text.encode("ascii"), MAX_SEGMENT - len(b"ldm 9999/9999 ")
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    comments = [b"ldm %d/%d " % (k, len(parts)) + part for k, part in enumerate(parts, 1)]
    return b"".join(b"\xff\xfe" + (len(each) + 2).to_bytes(2, "big") + each for each in comments)


def joined_comments(segments: Sequence[tuple[str, bytes]]) -> str | None:
    """Return the text that `comment_segments` wrote into a JPEG's segments; None if a part is missing."""
    comments = [content for kind, content in segments if kind == "COM"]
    parts = [found for found in map(COMMENT_PART.fullmatch, comments) if found is not None]
    numbers = [(int(part[1]), int(part[2])) for part in parts]
    if not parts or numbers != [(k, len(parts)) for k in range(1, len(parts) + 1)]:
        return None
    return b"".join(part[3] for part in parts).decode("ascii", errors="replace")


def read_recipe(path: str | Path | bytes) -> dict[str, Any]:
    """Return the recipe inside a PNG, JPEG or WebP file, of which the path or the content is given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a readable image, or has no recipe.
    """
    text = decode_image(path, find_recipe_text, formats=tuple(dict.fromkeys(FORMATS.values())))
    where = "the image" if isinstance(path, bytes) else shown(str(path))
    if text is None:
        raise ValueError(f"{where} has no recipe inside: it was not made by ldm, or its metadata was removed")
    return parse_json(text, f"the recipe in {where}", infinite=True)


def find_recipe_text(image: Image) -> str | None:
    """Decode an open image and return the JSON text of its recipe; None if it has none."""
    image.load()  # a PNG's text may follow the pixels
    text = getattr(image, "text", {}).get(RECIPE_KEY)  # of a PNG
    if text is not None:
        return str(text)
    if (text := joined_comments(getattr(image, "applist", ()))) is not None:  # of a JPEG
        return text
    try:
        comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    except Exception:  # malformed EXIF of another program, for which PIL raises errors of many classes
        return None
    if not isinstance(comment, bytes) or not comment.startswith(COMMENT_START):
        return None
    return comment.removeprefix(COMMENT_START).decode("ascii", errors="replace").removesuffix("}")
