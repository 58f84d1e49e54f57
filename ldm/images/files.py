"""Image files: written whole or not at all, with the recipe inside."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


RECIPE_KEY = "ldm"  # the PNG text chunk that holds the recipe, as JSON


def check_writable(path: str | Path, suffix: str = ".png") -> Path:
    """The path, if a PNG (or GIF) can be written there: found out before any work; ValueError or an OSError
    that names it otherwise."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(
            f"{str(path)!r}: {suffix[1:].upper()} is written, expected a name that ends in {suffix}"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, expected a file name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{str(path)!r} cannot be written")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(f"{str(path)!r} cannot be written: {error.strerror}") from None
    return path


def _write_png(path: Path, image: Image, recipe: Mapping[str, Any]) -> None:
    from PIL.PngImagePlugin import PngInfo

    check_writable(path)
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, json.dumps(recipe, ensure_ascii=False))
    _write_whole(path, lambda target: image.save(target, format="PNG", pnginfo=info))


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe inside a PNG; FileNotFoundError, or ValueError if the file is no picture or has none."""
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(RECIPE_KEY)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{str(path)!r} is not a picture that can be read: {error}") from None
    if text is None:
        raise ValueError(
            f"{str(path)!r} has no recipe inside: it was not made by ldm, or its metadata was removed"
        )
    try:
        recipe = json.loads(text)
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe in {str(path)!r} cannot be read: it is no JSON mapping")
    return recipe
