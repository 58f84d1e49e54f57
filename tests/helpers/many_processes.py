"""Functions that run in several processes at once, as `torchrun` starts them, by forks of one process."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

import torch
from killing import forked


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_together(size: int, action: Callable[[], object]) -> list[int]:
    """Start an action in forked processes that `joined_processes` joins; return their numbers.

    The process that forks must have one thread, as in `killing.in_fresh_process`.
    """
    port = free_port()

    def act(rank: int) -> None:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, **where}
        os.environ.update({name: str(value) for name, value in numbers.items()})
        torch.set_num_threads(1)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            raise

    return [forked(lambda rank=rank: act(rank)) for rank in range(size)]  # type: ignore[misc]


def run_together(size: int, action: Callable[[], object]) -> list[int]:
    """Run an action in forked processes; return their exit statuses, by rank."""
    return [os.waitpid(child, 0)[1] for child in start_together(size, action)]
