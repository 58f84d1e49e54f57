"""Read and write safetensors files.

The format: 8 bytes with the length of the header (little-endian), the header as JSON ({name: {dtype, shape,
data_offsets}}), then the bytes of the tensors without gaps. Files are memory-mapped, so that a tensor is not
read before it is used, and every number in the header is checked first.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.support.files import open_atomically
from ldm.support.text import escaped, shown

STORED_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the format's reference reader
MAX_PARTS = 1_000_000  # values of a header: a tensor has about ten
MAX_DIMENSIONS = 64  # of a tensor; PyTorch's own limit
MAX_EXTENT = 2**48  # of a dimension or an offset; no machine has more memory
MAX_NAME = 1000  # characters of a tensor's name
MAX_TENSORS = 50_000  # of a file
ALIGNMENT = (
    64  # bytes, as PyTorch allocates; libraries round products of tensors that lie elsewhere in other ways
)
STRING = re.compile(rb'"[^"]*"')  # in JSON without escapes


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The description of one tensor in a header; ``begin`` and ``end`` are byte offsets in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


def existing_file(path: str | Path) -> Path:
    """Return ``path`` if it is a file; raise FileNotFoundError or IsADirectoryError otherwise."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    return path


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the descriptions of the tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file, is truncated, or its header contradicts itself or the
            size of the file; the message names the file.
    """
    path = existing_file(path)
    return _parse_header(map_file(path), path)


def _parse_header(data: mmap.mmap, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return what `read_header` returns, from the memory map of a file."""
    where, size, length = repr(str(path)), len(data), int.from_bytes(data[:8], "little")
    if size < 9 or data[8:9] != b"{" or length > MAX_HEADER:
        raise ValueError(f"{where} is not a safetensors file{_likely_content(data[:9])}")
    base = 8 + length
    if base > size:
        raise ValueError(f"{where} is truncated: {size} bytes, but its header alone has {base}")
    header = _parse_json(data[8:base], where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{where}: the metadata in its header is not a mapping of strings")
    try:
        "".join((*metadata, *metadata.values())).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: the metadata in its header is not text: it has lone surrogates") from None
    check_names(header, path)
    infos = {name: _tensor_info(entry, base, f"{where}: tensor {name!r}") for name, entry in header.items()}
    _check_extent(infos, base, size, path)
    return infos, metadata


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Return the mapping in a header; its parts are counted first, as each takes up to 30 times its bytes."""
    if (parts := _count_parts(text)) > MAX_PARTS:
        raise ValueError(f"{where}: its header has {parts:,} parts, the limit is {MAX_PARTS:,}")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the header is not valid JSON ({escaped(error, 300)})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{where}: the header is {shown(header)}, expected a mapping")
    return header


def _count_parts(text: bytes) -> int:
    """Return the number of values in a JSON text, or of quotes if these are too many."""
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    if (quotes := plain.count(b'"')) > MAX_PARTS:
        return quotes
    outside = STRING.sub(b"", plain)
    return sum(map(outside.count, (b",", b"[", b"{")))


def check_names(names: Collection[object], path: Path) -> None:
    """Raise ValueError unless the names of a file's tensors are text that can be printed."""
    if len(names) > MAX_TENSORS:
        raise ValueError(f"{str(path)!r} has {len(names):,} tensors, the limit is {MAX_TENSORS:,}")
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_NAME or escaped(name) != name:
            raise ValueError(
                f"{str(path)!r}: a tensor is called {shown(name)}, expected a string of at most {MAX_NAME}"
                " visible characters"
            )


def _likely_content(head: bytes) -> str:
    """Return what a file that is not in the format looks like, in parentheses; empty if unknown."""
    for magic, what in (
        (b"PK\x03\x04", "a zip archive: a .ckpt or .pt under another name?"),
        (b"version ", "a Git LFS pointer: the weights are not here"),
        (b"<", "an HTML or XML page: a failed download?"),
        (b"\x80", "a pickle"),
        (b"", "too short"),
    ):
        if head.startswith(magic) and (magic or len(head) < 9):
            return f" (it looks like {what})" if magic else f" ({what})"
    return ""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key is given twice")
    return mapping


def _tensor_info(entry: Any, base: int, where: str) -> TensorInfo:
    """Return the checked description of a tensor.

    Args:
        entry: Its entry in the header.
        base: Byte offset of the first tensor in the file.
        where: Start of error messages.
    """
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets in the header, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise ValueError(f"{where}: unknown dtype {shown(dtype)}; known: {', '.join(STORED_DTYPES)}")
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        if (
            not isinstance(numbers, list)
            or len(numbers) > MAX_DIMENSIONS
            or not all(type(n) is int and 0 <= n <= MAX_EXTENT for n in numbers)
        ):
            raise ValueError(
                f"{where}: {name} {shown(numbers)}, expected a list of at most {MAX_DIMENSIONS} integers of"
                f" at least 0 and at most {MAX_EXTENT:,}"
            )
    size = math.prod(shape) * STORED_DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size or math.prod(filter(None, shape)) > MAX_EXTENT:
        raise ValueError(
            f"{where}: the header contradicts itself: data_offsets {shown(offsets)} do not hold shape"
            f" {shown(shape)} of {dtype}"
        )
    return TensorInfo(
        dtype=STORED_DTYPES[dtype], shape=tuple(shape), begin=base + offsets[0], end=base + offsets[1]
    )


def _check_extent(infos: Mapping[str, TensorInfo], base: int, size: int, path: Path) -> None:
    """Raise ValueError unless the tensors fill a file exactly.

    Args:
        infos: Descriptions of the tensors.
        base: Byte offset of the first tensor.
        size: Size of the file in bytes.
        path: The file, for messages.
    """
    end = base
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            what = "overlaps the previous one" if info.begin < end else "leaves a gap before it"
            raise ValueError(
                f"{str(path)!r}: the header is wrong: tensor {name!r} {what} (at byte {info.begin}, expected"
                f" {end})"
            )
        end = info.end
    if end > size:
        raise ValueError(f"{str(path)!r} is truncated: {size} bytes, but its header describes {end}")
    if end < size:
        raise ValueError(
            f"{str(path)!r}: {size - end} bytes follow the last tensor; the header describes {end} of {size}"
        )


def map_file(path: Path) -> mmap.mmap:
    """Return a private memory map of a file: pages are read when used, and writes stay in memory.

    Raises:
        ValueError: If the file is empty; the message names it.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{str(path)!r} is empty: too short for a file of weights")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def mapped_bytes(data: mmap.mmap, begin: int, size: int, alignment: int) -> Tensor:
    """Return a flat uint8 tensor that shares the memory of a map; a copy if its offset is not aligned.

    Args:
        data: The memory map.
        begin: Offset of the first byte.
        size: Number of bytes.
        alignment: Number of bytes of which the offset is a multiple, or a copy is made.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if begin % alignment:
        return torch.frombuffer(bytearray(data[begin : begin + size]), dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8, count=size, offset=begin)


def mapped_tensor(data: mmap.mmap, info: TensorInfo) -> Tensor:
    """Return a tensor that shares the memory of a map; see `mapped_bytes`."""
    flat = mapped_bytes(data, info.begin, info.end - info.begin, info.dtype.itemsize)
    return (
        flat.view(info.dtype).view(info.shape)
        if flat.numel()
        else torch.empty(info.shape, dtype=info.dtype, device="cpu")
    )


def read_safetensors(path: str | Path, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name; on the CPU they are memory-mapped.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file, is truncated, or has a wrong header.
    """
    return {name: tensor.to(device) for name, tensor in map_safetensors(path)[0].items()}


def map_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the memory-mapped tensors of a safetensors file by name, and its metadata."""
    path = existing_file(path)
    data = map_file(path)
    infos, metadata = _parse_header(data, path)
    return {name: mapped_tensor(data, info) for name, info in infos.items()}, metadata


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, completely or not at all.

    The bytes of the file depend only on names, tensors and metadata. In memory that maps the file, a tensor
    begins at a multiple of `ALIGNMENT` bytes if the sizes of all tensors before it are such multiples, and
    tensors of these sizes come first.

    Args:
        path: The file to write. Its folder must exist.
        tensors: Dense tensors with data, by name.
        metadata: Strings by name that are written into the header.

    Raises:
        TypeError: If a tensor is sparse, on the meta device or of an unknown dtype, or metadata are not
            strings.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        _check_dense(name, tensor)
    # first what keeps the alignment, then widest items first
    order = sorted(
        tensors, key=lambda name: (_size(tensors[name]) % ALIGNMENT != 0, -tensors[name].dtype.itemsize, name)
    )
    text = _header_text(tensors, order, metadata)
    with open_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_tensor_bytes(tensors[name]))


def _check_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r}: expected a dense tensor with data, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in NAMES:
        found = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
        raise TypeError(f"{name!r}: expected a dense tensor with data, got {found}")


def _header_text(
    tensors: Mapping[str, Tensor], order: Sequence[str], metadata: Mapping[str, str] | None
) -> bytes:
    """Return the header of tensors in an order, padded so that their data begins aligned."""
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
            raise TypeError(f"metadata: expected strings, got {dict(metadata)!r}")
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in order:
        begin, end = end, end + _size(tensors[name])
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + 8) % ALIGNMENT)  # 8 bytes before the text state its length


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _tensor_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in 64 hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**18))
    with existing_file(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def fingerprint(path: str | Path, blocks: int = 256, size: int = 4096) -> str:
    """Return a name of a file's content that takes milliseconds to compute at any size.

    It tells files of different weights apart, but does not prove that a file is intact.

    Args:
        path: The file.
        blocks: Number of blocks, spread evenly over the file. Default: 256.
        size: Bytes of each block. Default: 4096.

    Returns:
        The SHA-256 of the file's length and the blocks, in 64 hexadecimal digits.
    """
    path = existing_file(path)
    total = path.stat().st_size
    digest = hashlib.sha256(str(total).encode())
    with path.open("rb") as file:
        for i in range(blocks):
            file.seek(max(0, total - size) * i // max(1, blocks - 1))
            digest.update(file.read(size))
    return digest.hexdigest()
