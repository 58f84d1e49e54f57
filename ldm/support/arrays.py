"""NumPy files that are written in parts."""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ldm.support.files import open_atomically


def write_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    blocks: Iterable[np.ndarray],
    *,
    sealed: bool = False,
) -> None:
    """Write an .npy file from consecutive blocks of rows, whole or not at all.

    The disk space is allocated before the first block is asked for, so that a full disk is noticed before the
    blocks are computed.

    Args:
        path: The file.
        shape: Shape of the array.
        dtype: Type of its entries.
        blocks: Arrays (n, *shape[1:]), which are converted to `dtype`.
        sealed: Whether to append the SHA-256 of the file, which only `read_sealed` reads. Default: False.

    Raises:
        OSError: If the file cannot be written; the message names it.
        ValueError: If the blocks do not have the shape.
    """
    kind, digest, rows = np.dtype(dtype), hashlib.sha256(), 0
    header = _header(shape, kind)
    with open_atomically(path) as file:
        size = len(header) + math.prod(shape) * kind.itemsize + sealed * digest.digest_size
        _allocate(file.fileno(), size)
        file.write(header)
        digest.update(header)
        for block in blocks:
            if block.shape[1:] != shape[1:]:
                raise ValueError(f"{str(path)!r}: expected rows of shape {shape[1:]}, got {block.shape[1:]}")
            data = np.ascontiguousarray(block, kind).data
            file.write(data)
            digest.update(data)
            rows += len(block)
        if rows != shape[0]:
            raise ValueError(f"{str(path)!r}: expected {shape[0]} rows, got {rows}")
        if sealed:
            file.write(digest.digest())


def read_sealed(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray | None:
    """Return the array in a file of `write_array`, memory-mapped, or None if the file is another or damaged.

    Args:
        path: The file.
        shape: Shape that the array must have, with at least one entry.
        dtype: Type that its entries must have.
    """
    header = _header(shape, np.dtype(dtype))
    try:
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return None
            array = np.memmap(file, dtype, "r", len(header), shape)
            file.seek(len(header) + array.nbytes)
            seal = file.read()
    except (OSError, ValueError):  # there is no such file, or it is shorter
        return None
    digest = hashlib.sha256(header)
    digest.update(array.data)
    return array if digest.digest() == seal else None


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Return the bytes of an .npy file before its entries."""
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def _allocate(handle: int, size: int) -> None:
    """Allocate disk space for a file, where the system can; elsewhere a full disk is noticed when writing."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
