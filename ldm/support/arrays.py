"""NumPy files that are written in parts."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ldm.support.files import open_atomically


def write_array(
    path: Path, shape: tuple[int, ...], dtype: type[np.generic], blocks: Iterable[np.ndarray]
) -> None:
    """Write an .npy file from consecutive blocks of rows, whole or not at all.

    The disk space is allocated before the first block is asked for, so that a full disk is noticed before the
    blocks are computed.

    Args:
        path: The file.
        shape: Shape of the array.
        dtype: Type of its entries.
        blocks: Arrays (n, *shape[1:]), which are converted to `dtype`.

    Raises:
        OSError: If the file cannot be written; the message names it.
        ValueError: If the blocks do not have the shape.
    """
    kind = np.dtype(dtype)
    with open_atomically(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        _allocate(file.fileno(), file.tell() + math.prod(shape) * kind.itemsize)
        rows = 0
        for block in blocks:
            if block.shape[1:] != shape[1:]:
                raise ValueError(f"{str(path)!r}: expected rows of shape {shape[1:]}, got {block.shape[1:]}")
            file.write(np.ascontiguousarray(block, kind).data)
            rows += len(block)
        if rows != shape[0]:
            raise ValueError(f"{str(path)!r}: expected {shape[0]} rows, got {rows}")


def _allocate(handle: int, size: int) -> None:
    """Allocate disk space for a file, where the system can; elsewhere a full disk is noticed when writing."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
