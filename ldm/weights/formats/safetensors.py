"""Safetensors files, memory-mapped, and strict loading into a module.

The format: 8 bytes little-endian header length, that many bytes of JSON ({name: {dtype, shape,
data_offsets}}), then the tensors' bytes without holes. Reading touches no page of a tensor before it is used,
and every number in the header is checked first.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.weights.cast import cast, is_finite

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
MAX_HEADER = 100_000_000  # bytes; the limit that the format's own reader sets


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of one tensor; ``begin`` and ``end`` are bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def existing_file(path: str | Path) -> Path:
    """The path, if it is a file: FileNotFoundError or IsADirectoryError (both OSError) otherwise."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    return path


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors' descriptions and the metadata of a safetensors file, wholly checked against the file's
    size; ValueError if wrong."""
    path = existing_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        start = file.read(1)
        if len(head) < 8 or start != b"{" or length > MAX_HEADER:
            raise ValueError(f"{str(path)!r} is not a safetensors file{_guess(head + start)}")
        if 8 + length > size:
            raise ValueError(
                f"{str(path)!r} is truncated: {size} bytes, but its header alone has {8 + length}"
            )
        text = start + file.read(length - 1)
    try:
        header = json.loads(text, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r}: its header is no valid JSON ({error})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{str(path)!r}: the metadata in its header is not a mapping of strings")
    infos = {
        name: _entry(entry, 8 + length, f"{str(path)!r}: tensor {name!r}") for name, entry in header.items()
    }
    _check_extent(infos, 8 + length, size, path)
    return infos, metadata


def _guess(head: bytes) -> str:
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


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key is given twice")
    return mapping


def _entry(entry: Any, base: int, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{where}: expected dtype, shape and data_offsets in the header, got {str(entry)[:80]}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in STORED_DTYPES:
        raise ValueError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(STORED_DTYPES)}")
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{where}: {name} {str(numbers)[:80]}, expected a list of numbers from 0")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * STORED_DTYPES[dtype].itemsize:
        raise ValueError(
            f"{where}: the header lies: data_offsets {offsets} do not hold shape {shape} of {dtype}"
        )
    return TensorInfo(
        dtype=STORED_DTYPES[dtype], shape=tuple(shape), begin=base + offsets[0], end=base + offsets[1]
    )


def _check_extent(infos: Mapping[str, TensorInfo], base: int, size: int, path: Path) -> None:
    end = base
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            what = "overlaps the one before it" if info.begin < end else "leaves a hole before it"
            raise ValueError(
                f"{str(path)!r}: the header lies: tensor {name!r} {what} (at byte {info.begin}, expected"
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
    """The file's bytes as a private mapping: read page by page when touched; writing to it changes the
    memory, never the file."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def mapped_tensor(data: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> Tensor:
    """A tensor over mapped bytes; a copy only where the place is not a multiple of the item's size."""
    numel = math.prod(shape)
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    if begin % dtype.itemsize:
        copy = bytearray(data[begin : begin + numel * dtype.itemsize])
        return torch.frombuffer(copy, dtype=dtype, count=numel).view(shape)
    return torch.frombuffer(data, dtype=dtype, count=numel, offset=begin).view(shape)


def read_safetensors(path: str | Path, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; on the CPU they are memory-mapped, so nothing is read before
    it is used.

    FileNotFoundError if absent; ValueError naming the file if it is no safetensors file, is truncated or has
    a header that lies.
    """
    return {name: tensor.to(device) for name, tensor in map_safetensors(path)[0].items()}


def map_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read_safetensors` on the CPU, and the metadata beside the tensors."""
    path = existing_file(path)
    infos, metadata = read_header(path)
    data = map_file(path)
    return {
        name: mapped_tensor(data, info.dtype, info.shape, info.begin) for name, info in infos.items()
    }, metadata


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name, whole or not at all: to a temporary file beside ``path``, flushed to the disk,
    then moved there.

    The bytes depend on names, tensors and metadata alone. TypeError for what is no dense tensor or no string.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.dtype not in NAMES
        ):
            what = (
                f"{tensor.layout} {tensor.dtype} on {tensor.device}"
                if isinstance(tensor, Tensor)
                else type(tensor).__name__
            )
            raise TypeError(f"{name!r}: expected a dense tensor with data, got {what}")
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
            raise TypeError(f"metadata: expected strings, got {dict(metadata)!r}")
        header["__metadata__"] = dict(sorted(metadata.items()))
    # wide items first: all are aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.write(_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def sha256(path: str | Path) -> str:
    """The file's SHA-256, 64 hexadecimal digits."""
    with existing_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: str | Path, blocks: int = 256, size: int = 4096) -> str:
    """A name for a file's content that costs milliseconds at any size: SHA-256 over its length and blocks
    spread evenly over it, 64 digits.

    It tells files of different weights apart; it does not prove that a file is whole.
    """
    path = existing_file(path)
    total = path.stat().st_size
    digest = hashlib.sha256(str(total).encode())
    with path.open("rb") as file:
        for i in range(blocks):
            file.seek(max(0, total - size) * i // max(1, blocks - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


def mismatch(missing: Iterable[str], extra: Iterable[str], misshapen: Iterable[str], show: int = 5) -> str:
    """One sentence on keys that do not fit, the first few of each kind with counts; empty if all fit."""
    parts = []
    for what, keys in (
        ("missing", list(missing)),
        ("unexpected", list(extra)),
        ("misshapen", list(misshapen)),
    ):
        if keys:
            more = f" and {len(keys) - show} more" if len(keys) > show else ""
            parts.append(f"{len(keys)} {what} ({', '.join(keys[:show])}{more})")
    return "; ".join(parts)


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    dtype: torch.dtype | None = None,
    allow_nan: bool = False,
) -> None:
    """Put a state dict into a module, strictly both ways, by assignment: a module built on the meta device
    gets the tensors themselves.

    dtype: what floating-point tensors become (the one copy made); None leaves each as it is. ``source`` names
    the file in errors. ValueError, one for all, lists missing, unexpected and misshapen keys; another names
    tensors that hold NaN or infinity. The module is untouched then. Buffers that are not part of the state
    dict are made again by a ``reset_buffers`` method of their module.
    """
    want = module.state_dict()
    shapes = {key: (tuple(state[key].shape), tuple(want[key].shape)) for key in want if key in state}
    wrong = mismatch(
        [key for key in want if key not in state],
        [key for key in state if key not in want],
        [f"{key}: {have}, expected {need}" for key, (have, need) in shapes.items() if have != need],
    )
    if wrong:
        raise ValueError(f"{str(source)!r} does not fit {type(module).__name__}: {wrong}")
    ready, bad = cast({key: state[key] for key in want}, dtype)
    if bad and not allow_nan:
        raise ValueError(f"{str(source)!r}{_unsound(bad, ready, state)}")
    module.load_state_dict(ready, strict=True, assign=True)
    for part in module.modules():
        if any(buffer.is_meta for buffer in part.buffers(recurse=False)) and hasattr(part, "reset_buffers"):
            part.reset_buffers()
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(
            f"{type(module).__name__}: {len(left)} tensors are in no state dict and have no data"
            f" ({', '.join(left[:5])})"
        )


def _unsound(bad: Sequence[str], ready: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What is wrong with tensors that are not finite: what they were made of, or the dtype that they were
    made into."""
    overflown = [key for key in bad if is_finite(state[key])]
    if overflown:
        wide, narrow = state[overflown[0]].dtype, ready[overflown[0]].dtype
        return (
            f": {narrow} cannot hold the {wide} values of {len(overflown)} tensors"
            f" ({', '.join(overflown[:5])})"
        )
    return f": NaN or infinity in {len(bad)} tensors ({', '.join(bad[:5])}); the weights are damaged"
