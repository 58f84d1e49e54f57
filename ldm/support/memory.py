"""How much memory is free, and tensors whose pages leave it."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Key = TypeVar("_Key", bound=Hashable)

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
PAGEMAP = Path("/proc/self/pagemap")  # of each page 8 bytes, whose last three bits say where it is:
NOWHERE, IN_FILE = 0, 0b101  # nowhere yet; in memory, as a page of a file that this process has not changed
DONTNEED = 4  # advice of madvise: drop the pages from memory; a mapped file still has them


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that are free on a device, or None if the system does not say.

    On the CPU it is what the system states as available, or less where a control group limits the process
    (Linux).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    stated = [value for value in (_available(), _left_in_group()) if value is not None]
    return min(stated, default=None)


def _available() -> int | None:
    """Return what /proc/meminfo states as available."""
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_group() -> int | None:
    """Return what a control group (version 2) leaves; None if it has no limit.

    Pages of files that were not used lately count as free.
    """
    try:
        limit = int((CGROUP / "memory.max").read_text(encoding="utf-8"))
        used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
        stat = dict(
            line.split() for line in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, limit - used + int(stat.get("inactive_file", 0)))


def release_unchanged(tensors: Iterable[Tensor]) -> None:
    """Let tensors leave memory that are mapped from a file and unchanged; they are read again when used.

    The system mostly keeps the file's content, so that reading it again needs no disk. A tensor stays if one
    of its pages was written to, or if it is in no file, as do all where the system does not state its pages
    (Linux does). Values never change.

    Args:
        tensors: Tensors of any kind.
    """
    found = list(tensors)
    try:
        for i in in_file(dict(enumerate(found))):
            evict_pages(*whole_pages(found[i]))
    except (OSError, RuntimeError):
        return  # memory is not spared


def in_file(tensors: Mapping[_Key, Tensor]) -> list[_Key]:
    """Return which tensors are mapped from a file and unchanged, as far as their whole pages show.

    None are where the system does not state its pages, and none that are smaller than a page.

    Args:
        tensors: Tensors of any kind, by any keys.
    """
    found = []
    try:
        with PAGEMAP.open("rb", buffering=0) as pages:
            for key, tensor in tensors.items():
                if tensor.device.type != "cpu" or not tensor.is_contiguous():
                    continue
                begin, size = whole_pages(tensor)
                pages.seek(begin // mmap.PAGESIZE * 8)
                stated = np.frombuffer(pages.read(size // mmap.PAGESIZE * 8), np.uint64) >> np.uint64(61)
                if size and np.isin(stated, (NOWHERE, IN_FILE)).all():
                    found.append(key)
    except OSError:
        return []
    return found


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def whole_pages(tensor: Tensor) -> tuple[int, int]:
    """Return the address and the bytes of the pages that hold a contiguous tensor and nothing else."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return begin, max(0, end // mmap.PAGESIZE * mmap.PAGESIZE - begin)


def evict_pages(begin: int, size: int) -> None:
    """Let the pages of `size` bytes from the address `begin` leave memory.

    What is not in a file is lost.

    Raises:
        RuntimeError: On systems without madvise; Linux has it.
        OSError: If the system refuses.
    """
    libc = _libc()
    if not hasattr(libc, "madvise"):
        raise RuntimeError("memory=True needs madvise, which this system lacks")
    if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")
