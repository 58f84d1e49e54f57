"""Damaged images: decoded, or refused with a reason."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from fuzzing import Target, check, write_file
from image_mutations import mutated_png
from mutations import mixed, mutated_bytes
from PIL import Image

from ldm.conditioning.exemplar_library import read_exemplar
from ldm.images.files import find_recipe_text
from ldm.images.opening import MAX_PIXELS_VARIABLE, decode_image
from ldm.images.pixels import to_pixels

SIDE = 12
PIXELS = 2**22  # the limit while damaged sizes are read: an image takes some 16 bytes of memory a pixel


def place(mutant: bytes, folder: Path) -> Path:
    os.environ[MAX_PIXELS_VARIABLE] = str(PIXELS)
    return write_file(mutant, folder)


def read(path: Path) -> None:
    """Read an image as every `image=` argument is read, and look for a recipe in it."""
    decode_image(path, find_recipe_text)
    to_pixels(path)


def saved(form: str, mode: str, **options: object) -> bytes:
    """Return a small image in a format and a mode of PIL."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8), "RGBA")
    file = io.BytesIO()
    (rgba.convert("L") if mode == "I" else rgba).convert(mode).save(file, form, **options)
    return file.getvalue()


def gray16() -> bytes:
    """Return a PNG with 16 bits per pixel."""
    file = io.BytesIO()
    Image.fromarray(np.arange(SIDE**2, dtype=np.uint16).reshape(SIDE, SIDE) * 400).save(file, "PNG")
    return file.getvalue()


def animated(form: str) -> bytes:
    """Return an image of three frames."""
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "green", "blue")]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()


COMPRESSIONS = ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
SEEDS = {
    "png": [
        *(saved("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        gray16(),
        animated("PNG"),
    ],
    "jpeg": [
        saved("JPEG", "RGB"),
        saved("JPEG", "L", progressive=True),
        saved("JPEG", "CMYK"),
        animated("MPO"),
    ],
    "webp": [saved("WEBP", "RGB"), saved("WEBP", "RGBA", lossless=True), animated("WEBP")],
    "gif": [saved("GIF", "P"), animated("GIF")],
    "tiff": [
        *(saved("TIFF", mode) for mode in ("RGB", "RGBA", "L", "I", "1")),
        *(saved("TIFF", "RGB", compression=name) for name in COMPRESSIONS),
        animated("TIFF"),
    ],
    "bmp": [saved("BMP", mode) for mode in ("RGB", "L", "P", "1", "RGBA")],
}


@pytest.mark.parametrize("form", SEEDS)
def test_damaged_images(form: str, tmp_path: Path) -> None:
    mutate = mixed(mutated_png, mutated_bytes) if form == "png" else mutated_bytes
    check(Target(name=f"{form} images", read=read, place=place), SEEDS[form], mutate, tmp_path)


def read_content(path: Path) -> None:
    """Read an exemplar, which is an image inside a library."""
    read_exemplar(path.read_bytes(), SIDE)


def test_damaged_exemplars(tmp_path: Path) -> None:
    seeds = [saved("WEBP", "RGBA", lossless=True), saved("PNG", "RGBA")]
    target = Target(name="exemplars", read=read_content, names="exemplar")
    check(target, seeds, mixed(mutated_png, mutated_bytes), tmp_path)
