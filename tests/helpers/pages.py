"""Which pages of a tensor are in memory."""

from __future__ import annotations

import mmap

import numpy as np
from torch import Tensor

from ldm.support.memory import PAGEMAP, whole_pages


def in_memory(tensor: Tensor) -> int:
    """Return how many of a contiguous tensor's whole pages are in memory (Linux)."""
    begin, size = whole_pages(tensor)
    with PAGEMAP.open("rb", buffering=0) as pages:
        pages.seek(begin // mmap.PAGESIZE * 8)
        return int((np.frombuffer(pages.read(size // mmap.PAGESIZE * 8), np.uint64) >> np.uint64(63)).sum())
