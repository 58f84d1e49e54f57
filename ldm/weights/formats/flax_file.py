"""Read flax's msgpack files (flax_model.msgpack) without flax and without executing anything in them.

Such a file is one MessagePack value: nested maps with text as keys, whose leaves are arrays. An array is an
extension value of type 1, which holds a MessagePack list of its shape, the name of its dtype, and its bytes.
An array of more than 1 GiB is a map of chunks, which are joined again. Anything else is refused.

Every length is compared with the bytes that are there, values are counted, and nothing recurses deeper than
`MAX_LEVELS`: time and memory are proportional to the bytes that are read. Tensors are memory-mapped.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.support.text import shown
from ldm.weights.formats.safetensors import (
    MAX_DIMENSIONS,
    MAX_EXTENT,
    MAX_NAME,
    MAX_TENSORS,
    check_names,
    existing_file,
    map_file,
    mapped_bytes,
)

FLAX_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
ARRAY = 1  # flax's type of extension values that hold an array
CHUNKED = "__msgpack_chunked_array__"
MAX_LEVELS = 32
MAX_VALUES = 500_000  # of a file; a tensor has about eight
# code of a value with a stated length: (bytes of the length, kind)
SIZED = {
    **{0xD9 + i: (1 << i, "text") for i in range(3)},
    **{0xC4 + i: (1 << i, "bytes") for i in range(3)},
    **{0xC7 + i: (1 << i, "extension") for i in range(3)},
    **{0xDC + i: (2 << i, "list") for i in range(2)},
    **{0xDE + i: (2 << i, "map") for i in range(2)},
}
NUMBER_FORMATS = {
    0xCA: ">f",
    0xCB: ">d",
    **dict(zip(range(0xCC, 0xD4), (">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True)),
}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class Extent(NamedTuple):
    """Bytes of the file: where they begin, and their number."""

    begin: int
    size: int


class StoredArray(NamedTuple):
    """An array in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Extent


class MessageReader:
    """Reads one MessagePack value.

    Args:
        data: The bytes of the file.

    Attributes:
        at: Offset of the next byte.
        left: Number of values that may still be read.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end, self.left = data, 0, len(data), MAX_VALUES

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        extent = self.skip(size)
        return self.data[extent.begin : extent.begin + size]

    def skip(self, size: int) -> Extent:
        """Return where the next bytes are, and pass over them."""
        if size > self.end - self.at:
            raise ValueError(f"the file ends early: {size} bytes expected at byte {self.at}")
        self.at += size
        return Extent(self.at - size, size)

    def value(self, level: int = 0) -> Any:
        """Return the next value: None, a number, text, an `Extent`, a `StoredArray`, a list or a mapping."""
        self.left -= 1
        if self.left < 0 or level > MAX_LEVELS:
            raise ValueError(f"expected at most {MAX_VALUES:,} values and {MAX_LEVELS} levels")
        code = self.take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code in CONSTANTS:
            return CONSTANTS[code]
        if code in NUMBER_FORMATS:
            return struct.unpack(NUMBER_FORMATS[code], self.take(struct.calcsize(NUMBER_FORMATS[code])))[0]
        if code < 0xC0:
            size, kind = (
                (code & 0x0F, "map" if code < 0x90 else "list") if code < 0xA0 else (code & 0x1F, "text")
            )
        elif code in SIZED:
            width, kind = SIZED[code]
            size = int.from_bytes(self.take(width), "big")
        elif 0xD4 <= code <= 0xD8:
            size, kind = 1 << (code - 0xD4), "extension"
        else:
            raise ValueError(f"byte {self.at - 1}: {code:#04x} begins no value")
        return self._sized(kind, size, level)

    def _sized(self, kind: str, size: int, level: int) -> Any:
        """Return a value of a stated length.

        Args:
            kind: Its kind.
            size: Its length: bytes, or values of a list, or pairs of a map.
            level: How deep it is nested.
        """
        if kind == "text":
            return self.take(size).decode()
        if kind == "bytes":
            return self.skip(size)
        if kind == "extension":
            return self._array(size, level)
        if size > self.left:
            raise ValueError(
                f"a {kind} of {size:,} values at byte {self.at}, expected at most {MAX_VALUES:,}"
            )
        if kind == "list":
            return [self.value(level + 1) for _ in range(size)]
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(level + 1)
            if not isinstance(key, str) or len(key) > MAX_NAME or key in found:
                raise ValueError(f"the key {shown(key)}, expected different short texts")
            found[key] = self.value(level + 1)
        return found

    def _array(self, size: int, level: int) -> StoredArray:
        """Return the array of an extension value of `size` bytes behind its type."""
        kind, end = self.take(1)[0], self.at + size
        if kind != ARRAY:
            raise ValueError(f"an extension value of type {kind}, expected an array, {ARRAY}")
        parts = self.value(level + 1)
        if (
            self.at != end
            or not isinstance(parts, list)
            or len(parts) != 3
            or not isinstance(parts[2], Extent)
        ):
            raise ValueError(f"an array at byte {end - size} that is no list of shape, dtype and bytes")
        shape, dtype, data = parts
        if not isinstance(dtype, str) or dtype not in FLAX_DTYPES:
            raise ValueError(f"an array of dtype {shown(dtype)}; those read are {', '.join(FLAX_DTYPES)}")
        found = StoredArray(array_shape(shape), FLAX_DTYPES[dtype], data)
        if math.prod(found.shape) * found.dtype.itemsize != data.size:
            raise ValueError(f"an array of shape {found.shape} and dtype {dtype} with {data.size} bytes")
        return found


def array_shape(shape: Any) -> tuple[int, ...]:
    """Return a shape; ValueError for what is none."""
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n <= MAX_EXTENT for n in shape)
        or math.prod(max(n, 1) for n in shape) > MAX_EXTENT
    ):
        raise ValueError(f"an array of shape {shown(shape)}, expected a list of whole numbers")
    return tuple(shape)


def read_flax(path: str | Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a flax file by name, of which the pieces are joined by "/".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, is damaged, or holds what is not read; the message names it.
    """
    path = existing_file(path)
    data = map_file(path)
    try:
        reader = MessageReader(data)
        content = reader.value()
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, expected a map of arrays")
        if reader.at != reader.end:
            raise ValueError(f"{reader.end - reader.at} bytes follow its value")
        leaves = _leaves(content)
        check_names(leaves, path)
        return {name: _tensor(data, value, name) for name, value in leaves.items()}
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        reason = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"{str(path)!r} is damaged or no flax file: {reason}") from None


def _leaves(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested maps by their joined names; maps of chunks are leaves."""
    found: dict[str, Any] = {}
    stack: list[tuple[str, Any]] = [("", content)]
    while stack:
        name, value = stack.pop()
        inside = isinstance(value, dict) and CHUNKED not in value
        if len(name) > MAX_NAME or len(found) + len(stack) + (len(value) if inside else 1) > MAX_TENSORS:
            raise ValueError(f"{shown(name)}: expected at most {MAX_TENSORS:,} short names")
        if inside:
            stack += [(f"{name}/{key}" if name else key, inner) for key, inner in reversed(value.items())]
        elif name in found:
            raise ValueError(f"{shown(name)}: expected different names")
        else:
            found[name] = value
    return found


def _tensor(data: mmap.mmap, value: Any, name: str) -> Tensor:
    """Return the tensor of a leaf, whole or of chunks."""
    if isinstance(value, dict):
        pieces, shape = _in_order(value.get("chunks")), _in_order(value.get("shape"))
        if value[CHUNKED] is not True or not isinstance(pieces, list) or not pieces:
            raise ValueError(f"{shown(name)}: expected an array and its chunks")
        if not all(isinstance(piece, StoredArray) for piece in pieces):
            raise ValueError(f"{shown(name)}: a chunk is no array")
        flat = torch.cat([_tensor(data, piece, name).reshape(-1) for piece in pieces])
        if flat.numel() != math.prod(array_shape(shape)):
            raise ValueError(f"{shown(name)}: {flat.numel()} numbers for the shape {shown(shape)}")
        return flat.reshape(array_shape(shape))
    if not isinstance(value, StoredArray):
        raise ValueError(f"{shown(name)} is no array")
    flat = mapped_bytes(data, *value.data, value.dtype.itemsize)
    if not value.data.size:
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")
    return flat.view(value.dtype).view(value.shape)


def _in_order(value: Any) -> Any:
    """Return the list that flax writes as a map of its indices; any other value as it is."""
    return [value[key] for key in sorted(value, key=int)] if isinstance(value, dict) else value
