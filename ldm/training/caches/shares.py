"""The share of this process in work that the processes of a run divide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def own_share(work: Sequence[_T]) -> list[_T]:
    """Return what this process does: every N-th piece of work, of N processes."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if _together() else (0, 1)
    return list(work[rank::size])


def wait_for_others() -> None:
    """Wait until all processes of the run have come here."""
    if _together():
        dist.barrier()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
