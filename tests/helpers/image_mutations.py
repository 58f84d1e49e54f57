"""Damage image files: chunks of PNG with correct checksums, and recipes inside images."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from mutations import EDGES, mutated_bytes, mutated_json
from PIL import Image

from ldm.images.files import COMMENT_START, EXIF_IFD, RECIPE_KEY, USER_COMMENT

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NAMES = (
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"gAMA",
    b"cHRM",
    b"iCCP",
    b"eXIf",
    b"acTL",
    b"fcTL",
    b"fdAT",
)
NAMES += (b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"sRGB", b"tIME", b"oFFs", b"abcd", b"ABCD")

Chunks = list[tuple[bytes, bytes]]


def chunks_of(data: bytes) -> Chunks:
    """Return the name and the content of each chunk of a PNG."""
    found, at = [], len(SIGNATURE)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def png_of(chunks: Chunks) -> bytes:
    """Return a PNG with correct lengths and checksums."""
    return SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def mutated_png(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the PNG files with one to three of its chunks changed; checksums are correct."""
    chunks = chunks_of(rng.choice([seed for seed in seeds if seed.startswith(SIGNATURE)]))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(chunks))
        name, content = chunks[at]
        kind = rng.randrange(8)
        if kind == 0:
            del chunks[at]
        elif kind == 1:
            chunks.insert(rng.randrange(len(chunks) + 1), (rng.choice(NAMES), odd_content(rng)))
        elif kind == 2:
            chunks[at] = rng.choice(NAMES), content
        elif kind == 3:
            chunks[at:at] = [chunks[at]] * rng.choice((1, 2, 1000))
        elif kind == 4 and name == b"IDAT":
            chunks[at] = name, mutated_pixels(content, rng)
        elif kind == 5:
            chunks[at] = name, content * rng.choice((2, 50))
        elif kind == 6:
            chunks[0] = chunks[0][0], mutated_header(chunks[0][1], rng)
        elif content:
            chunks[at] = name, mutated_bytes([content], rng)
        if not chunks:
            break
    return png_of(chunks)


def mutated_pixels(content: bytes, rng: random.Random) -> bytes:
    """Return compressed pixels with a change before the compression, or after it if they are damaged."""
    try:
        return zlib.compress(mutated_bytes([zlib.decompress(content)], rng))
    except zlib.error:
        return mutated_bytes([content], rng)


def mutated_header(content: bytes, rng: random.Random) -> bytes:
    """Return the content of an IHDR with another size, depth, colour type or method."""
    data = bytearray(content.ljust(13, b"\0"))
    if rng.random() < 0.5:
        at = rng.choice((0, 4))
        data[at : at + 4] = (rng.choice((*EDGES, 8192, 65536)) % 2**32).to_bytes(4, "big")
    else:
        data[8 + rng.randrange(5)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return bytes(data)


def odd_content(rng: random.Random) -> bytes:
    """Return the content of a chunk that nobody expects: numbers, or text, some of it compressed."""
    text = rng.choice((b"", b"\0", b"a", b"\xff" * 20, b"x" * 2_000_000, b'{"a": ' * 1000))
    squeezed = zlib.compress(text)
    edge = (rng.choice(EDGES) % 2**32).to_bytes(4, "big")
    key = rng.choice((RECIPE_KEY.encode(), b"Raw profile type exif", b"k" * 79, b""))
    return rng.choice(
        (
            text[:1000],
            edge,
            edge * 4,
            edge * 7,
            key + b"\0" + text[:1000],
            key + b"\0\0" + squeezed,
            key + b"\0\1\0\0\0" + squeezed,
            key + b"\0\0\0\0\0" + text[:1000],
            key + b"\0\1\0en\0key\0" + squeezed[:-3],
            squeezed,
            b"MM\0*\0\0\0\x08" + edge[2:] + edge * 3,
        )
    )


def with_recipe(recipe: bytes, form: str, *, squeezed: bool = False) -> bytes:
    """Return an image file with a text in the place of its recipe.

    Args:
        recipe: The text.
        form: "PNG", "JPEG" or "WEBP".
        squeezed: Whether the text of a PNG is compressed. Default: False.
    """
    file = io.BytesIO()
    image = Image.new("RGB", (8, 6), (10, 200, 30))
    if form == "PNG":
        image.save(file, form)
        header, *rest = chunks_of(file.getvalue())
        body = b"\0\1\0\0\0" + zlib.compress(recipe) if squeezed else b"\0\0\0\0\0" + recipe
        return png_of([header, (b"iTXt", RECIPE_KEY.encode() + body), *rest])
    exif = Image.Exif()
    exif[EXIF_IFD] = {USER_COMMENT: COMMENT_START + recipe[:60_000] + b"}"}
    image.save(file, form, exif=exif)
    return file.getvalue()


def mutated_recipe(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return an image with one of the recipes (JSON) damaged."""
    recipe = mutated_json(seeds, rng) if rng.random() < 0.9 else mutated_bytes(seeds, rng)
    if rng.random() < 0.1:
        tree: dict[str, Any] = json.loads(rng.choice(seeds))
        key = rng.choice(list(tree))
        recipe = b"{" + json.dumps(key).encode() + b":1," + rng.choice(seeds)[1:]  # a key that is given twice
    form = rng.choice(("PNG", "PNG", "PNG", "JPEG", "WEBP"))
    return with_recipe(recipe, form, squeezed=rng.random() < 0.3)
