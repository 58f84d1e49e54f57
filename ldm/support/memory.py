"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


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
