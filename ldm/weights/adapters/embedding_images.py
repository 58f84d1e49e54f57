"""Textual inversions in images, as A1111 writes them.

A PNG has the content of a `.pt` file as JSON in base64, in its text chunk `sd-ti-embedding`; a tensor is a
mapping {"TORCHTENSOR": nested lists}. Older cards, and WebP files, have the same JSON, compressed, in their
pixels: black columns divide the image, and what is left and right of them holds the low and the high four
bits of each byte in the low four bits of its colours, behind numbers of a linear congruential generator.
"""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.support.files import BoundedFile
from ldm.support.strict_json import parse_json
from ldm.support.text import escaped

TEXT_KEY = "sd-ti-embedding"
TENSOR = "TORCHTENSOR"
LOW = 0x0F  # the bits of a colour that hold data
CARD_PIXELS = 2**22
CARD_BYTES = 2**22  # of the JSON text
EXPANSION = 16  # bytes of the JSON text for each byte of the file, at most; decimals are compressed to a half
LEAST_BYTES = 2**16  # of a text, whatever the size of the file
STARTS = (b"\x89PNG\r\n\x1a\n", b"RIFF")


def is_image(path: Path) -> bool:
    """Return whether a file is a PNG or a WebP, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(12)
    return head.startswith(STARTS[0]) or (head.startswith(STARTS[1]) and head.endswith(b"WEBP"))


def embedding_in_image(path: Path) -> dict[str, Any]:  # Any: the content of a .pt file
    """Return the content of the embedding in an image, with its tensors; its only token is its name.

    Args:
        path: A PNG or WebP file.

    Raises:
        ValueError: If the image is damaged or too large, or holds no embedding.
    """
    from PIL import Image

    where = repr(str(path))
    most = min(CARD_BYTES, max(LEAST_BYTES, EXPANSION * path.stat().st_size))
    try:
        with BoundedFile(path) as file, Image.open(file, formats=("PNG", "WEBP")) as image:
            if image.width * image.height > CARD_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels, expected at most {CARD_PIXELS:,}")
            image.load()
            stated = getattr(image, "text", {}).get(TEXT_KEY)
            if stated is None:
                text = _in_pixels(np.asarray(image.convert("RGB")), most)
            else:
                text = base64.b64decode(stated, validate=True)
        if len(text) > most:
            raise ValueError(f"its text has {len(text):,} bytes, expected at most {most:,}")
        content = parse_json(text.decode(), where)
    except Exception as error:  # decoders raise errors of every class
        reason = escaped(str(error) or type(error).__name__, 300)
        raise ValueError(f"{where} holds no embedding that can be read: {reason}") from None
    vectors, name = content.get("string_to_param"), content.get("name")
    if isinstance(vectors, dict) and list(vectors) == ["*"] and isinstance(name, str):
        content["string_to_param"] = {name: vectors["*"]}
    made: dict[str, Any] = _with_tensors(content, where)
    return made


def _in_pixels(pixels: np.ndarray, most: int) -> bytes:
    """Return the text in the pixels (H, W, 3) of a card, of at most `most` bytes."""
    shown = (pixels > 0).all(2)
    if not shown.any():
        raise ValueError("its pixels are black")
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    bits = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & LOW
    black = np.flatnonzero(~bits.any((0, 2)))
    if len(black) < 2:
        raise ValueError(f"it has no text chunk {TEXT_KEY}, and no columns that divide its pixels")
    low, high = (_uncovered(part) for part in (bits[:, : black[0]], bits[:, black[-1] + 1 :]))
    if low.shape != high.shape:
        raise ValueError(f"the parts of its pixels have the shapes {low.shape} and {high.shape}")
    reader = zlib.decompressobj()
    text = reader.decompress((high << 4 | low).tobytes(), most)
    if not reader.eof:
        raise ValueError(f"its text is cut off, or longer than {most:,} bytes")
    return text


def _uncovered(bits: np.ndarray) -> np.ndarray:
    """Return the data behind the numbers x ← 1664525·x + 1013904223 mod 2³², of which x mod 255 covers it."""
    factor, addend = 1664525, 1013904223  # of as many steps as there are numbers
    x = np.full(1, addend, dtype=np.uint32)
    while x.size < bits.size:
        x = np.concatenate([x, x * np.uint32(factor) + np.uint32(addend)])
        factor, addend = factor * factor % 2**32, (factor * addend + addend) % 2**32
    cover = (x[: bits.size] % 255).astype(np.uint8)
    return bits ^ (cover.reshape(bits.shape) & LOW)


def _with_tensors(value: Any, where: str) -> Any:  # Any: as JSON has it
    """Return a value of JSON with its tensors, float32."""
    if not isinstance(value, dict):
        return value
    if TENSOR not in value:
        return {key: _with_tensors(each, where) for key, each in value.items()}
    try:
        return torch.tensor(value[TENSOR], dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{where}: {TENSOR}: expected nested lists of numbers of one shape") from None
