"""The share of this process in work that the processes of a run divide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ldm.training.distributed.group import current_processes

_T = TypeVar("_T")


def own_share(work: Sequence[_T]) -> list[_T]:
    """Return what this process does: every N-th piece of work, of N processes."""
    processes = current_processes()
    return list(work[processes.rank :: processes.size])


def wait_for_others() -> None:
    """Wait until all processes of the run have come here."""
    current_processes().wait()
