"""Textual inversions in images: the text chunk, the pixels, and what is refused."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_mutations import chunks_of, png_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.weights.adapters.embedding_images import TEXT_KEY, _uncovered
from ldm.weights.adapters.embeddings import learned_vectors, split_embeddings
from ldm.weights.adapters.files import read_adapter

VECTORS = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
SIZE = (40, 32)


def content(vectors: Any = None, **changes: Any) -> bytes:
    """Return the text that A1111 writes for an embedding."""
    tensor = {"TORCHTENSOR": VECTORS.tolist() if vectors is None else vectors}
    stated = {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": "zor", "step": 12}
    return json.dumps({**stated, **changes}).encode()


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(16, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8) | 1


def with_chunk(path: Path, text: bytes) -> Path:
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(text).decode())
    Image.fromarray(photo()).save(path, pnginfo=info)
    return path


def covered(bits: np.ndarray) -> np.ndarray:
    """Return a block (H, W, 3) of 4-bit numbers as A1111 stores it, on a background of bright pixels."""
    numbers, x = [], 0
    for _ in range(bits.size):
        x = (x * 1664525 + 1013904223) % 4294967296
        numbers.append(x % 255 % 16)
    return (bits ^ np.array(numbers, dtype=np.uint8).reshape(bits.shape)) | 0x50


def in_pixels(path: Path, text: bytes, **options: Any) -> Path:
    data = np.frombuffer(zlib.compress(text, 9), dtype=np.uint8)
    data = np.resize(data, -(-len(data) // (3 * SIZE[1])) * 3 * SIZE[1])
    low, high = (covered(part.reshape(SIZE[1], -1, 3)) for part in (data & 15, data >> 4))
    line = np.zeros((SIZE[1], 1, 3), dtype=np.uint8)
    Image.fromarray(np.concatenate([low, line, photo(), line, high], axis=1)).save(path, **options)
    return path


def read(path: Path) -> tuple[tuple[str, ...], Tensor]:
    file = read_adapter(path)
    (name, tensors), *others = split_embeddings(file.tensors, path.stem)[0].items()
    found, unused = learned_vectors(name, tensors, {"text": 8}, None)
    assert found is not None and not others and not unused
    return found.triggers, found.vectors["text"]


@pytest.mark.parametrize("form", ["chunk", "pixels", "webp"])
def test_an_image_holds_the_vectors_and_their_name(tmp_path: Path, form: str) -> None:
    if form == "chunk":
        path = with_chunk(tmp_path / "card.png", content())
    elif form == "pixels":
        path = in_pixels(tmp_path / "card.png", content())
    else:
        path = in_pixels(tmp_path / "card.webp", content(), lossless=True, exact=True)
    triggers, vectors = read(path)
    assert triggers == ("card", "zor") and torch.equal(vectors, VECTORS)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [([[1.0, "a"]], "nested lists of numbers"), ([[1.0], [1.0, 2.0]], "nested lists of numbers")],
)
def test_numbers_that_are_no_tensor_are_refused(tmp_path: Path, vectors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_adapter(with_chunk(tmp_path / "card.png", content(vectors)))


@pytest.mark.parametrize("form", ["chunk", "compressed chunk", "pixels"])
def test_a_text_that_is_much_longer_than_its_file_is_refused(tmp_path: Path, form: str) -> None:
    text = content([0] * 2_000_000)
    path = tmp_path / "card.png"
    if form == "pixels":
        in_pixels(path, text)
    elif form == "chunk":
        with_chunk(path, content([0] * 4_000_000))
    else:
        info = PngInfo()
        info.add_text(TEXT_KEY, base64.b64encode(content([0] * 200_000)).decode(), zip=True)
        Image.fromarray(photo()).save(path, pnginfo=info)
    with pytest.raises(ValueError, match="card.png.*(cut off, or longer than|expected at most) [0-9,]+"):
        read_adapter(path)


def test_numbers_that_cover_the_pixels_are_those_of_the_generator() -> None:
    x, numbers = 0, []
    for _ in range(1000):
        x = (x * 1664525 + 1013904223) % 2**32
        numbers.append(x % 255 % 16)
    for size in (1, 2, 3, 64, 1000):
        assert _uncovered(np.zeros(size, dtype=np.uint8)).tolist() == numbers[:size]


@pytest.mark.parametrize("side", [2**13, 2**14])
def test_a_card_of_too_many_pixels_is_refused(tmp_path: Path, side: int) -> None:
    path = tmp_path / "card.png"
    Image.new("1", (side, side)).save(path)
    with pytest.raises(ValueError, match="card.png.*(pixels|exceeds limit)"):
        read_adapter(path)


def test_errors_of_decoders_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "card.png"
    with_chunk(path, content())
    head, *rest = chunks_of(path.read_bytes())
    for chunks in ([(head[0], head[1][:4]), *rest], rest, []):
        path.write_bytes(png_of(chunks))
        with pytest.raises(ValueError, match="card.png.*holds no embedding"):
            read_adapter(path)


def test_images_without_an_embedding_are_refused(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="no text chunk sd-ti-embedding"):
        read_adapter(tmp_path / "photo.png")
    Image.new("RGB", SIZE).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="its pixels are black"):
        read_adapter(tmp_path / "black.png")
    with pytest.raises(ValueError, match="holds no embedding"):
        read_adapter(with_chunk(tmp_path / "text.png", b"no json"))
    path = with_chunk(tmp_path / "cut.png", content())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="holds no embedding"):
        read_adapter(path)
