"""Damaged flax files: read with the names of PyTorch, or refused with a reason."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax_files import packed
from fuzzing import Target, check
from mutations import EDGES, changed_tree, mixed, mutated_bytes, odd_value

from ldm.weights.cast import is_finite
from ldm.weights.formats.flax_file import ARRAY, CHUNKED, read_flax
from ldm.weights.formats.single_file import FLAX_KIND, file_kind, read_tensors
from ldm.weights.rules.flax import torch_names


def read(path: Path) -> None:
    """Read a file, use every tensor, and give them the names of PyTorch."""
    tensors = read_flax(path)
    assert all(name.isprintable() for name in tensors)
    for tensor in tensors.values():
        is_finite(tensor)
    try:
        torch_names(tensors)
    except ValueError as error:
        raise ValueError(f"mutant: {error}") from None
    if file_kind(path) == FLAX_KIND:
        read_tensors(path)


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


LAYERS = {
    "FlaxBartAttention_0": {"q_proj": {"kernel": numbers(2, 3, 4)}},
    "LayerNorm_1": {"scale": numbers(2, 3)},
}
TREES = (
    {"params": {"model": {"encoder": {"layers": {"FlaxBartEncoderLayers": LAYERS}}}}},
    {"decoder": {"up_4": {"block_0": {"conv1": {"kernel": numbers(1, 2, 3, 4)}}}}},
    {"x": {CHUNKED: True, "shape": {"0": 2, "1": 3}, "chunks": {"0": numbers(4), "1": numbers(2)}}},
)


def mutated_tree(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return a file whose maps, keys and leaves are changed."""
    tree = json.loads(json.dumps(rng.choice(TREES), default=lambda array: {"array": list(array.shape)}))
    for _ in range(rng.choice((1, 1, 2, 3))):
        tree = changed_tree(tree, rng)
    try:
        return written(tree, rng)
    except RecursionError:  # two deep values, one in the other
        return mutated_bytes(seeds, rng)


def written(value: Any, rng: random.Random) -> bytes:
    """Return a tree of JSON as MessagePack; {"array": shape} is an array."""
    if isinstance(value, dict) and set(value) == {"array"}:
        shape = value["array"]
        if isinstance(shape, list) and all(type(n) is int and 0 <= n < 50 for n in shape) and len(shape) < 6:
            return array(shape, rng)
    if isinstance(value, dict) and len(value) < 60_000:
        head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xde" + len(value).to_bytes(2, "big")
        return head + b"".join(written(part, rng) for item in value.items() for part in item)
    if isinstance(value, list):
        return b"\xdd" + len(value).to_bytes(4, "big") + b"".join(written(each, rng) for each in value)
    if isinstance(value, str):
        text = value.encode(errors="surrogatepass")
        return b"\xdb" + len(text).to_bytes(4, "big") + text
    if isinstance(value, bool) or value is None:
        return {True: b"\xc3", False: b"\xc2", None: b"\xc0"}[value]
    if isinstance(value, int):
        return b"\xcf" + (value % 2**64).to_bytes(8, "big")
    return b"\xca\x7f\xc0\x00\x00"


def array(shape: list[int], rng: random.Random) -> bytes:
    """Return an array as an extension value, whose shape, dtype or number of bytes may be another."""
    data = bytes(4 * int(np.prod(shape)))
    parts = [list(shape), "float32", data]
    if rng.random() < 0.1:
        parts[rng.randrange(2)] = odd_value(rng)
    if rng.random() < 0.1:
        parts[0] = [rng.choice(EDGES) for _ in range(rng.randrange(5))]
    body = b"\x93" + b"".join(
        b"\xc6" + len(part).to_bytes(4, "big") + part if isinstance(part, bytes) else written(part, rng)
        for part in parts
    )
    kind = ARRAY if rng.random() < 0.95 else rng.randrange(256)
    return b"\xc9" + len(body).to_bytes(4, "big") + bytes([kind]) + body


def test_damaged_flax_files(tmp_path: Path) -> None:
    seeds = [packed(tree) for tree in TREES]
    check(Target(name="flax files", read=read), seeds, mixed(mutated_tree, mutated_bytes), tmp_path)
