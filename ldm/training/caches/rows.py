"""The file that holds what a frozen network makes of all cached samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.support.arrays import read_sealed, write_array
from ldm.support.progress import progress_bar
from ldm.training.distributed.group import current_processes

CACHES = Path("runs") / "latents"


@torch.no_grad()
def cached_rows(
    path: Path,
    samples: Sequence[Any],  # of any class: only `compute` reads them
    shape: tuple[int, ...],
    compute: Callable[[Sequence[Any]], Tensor],
    batch: int = 32,
) -> np.ndarray:
    """Return the outputs of `compute` for all samples from a file, which is written if it is not intact.

    Args:
        path: The file. It ends with its SHA-256; it is written whole or not at all.
        samples: N samples.
        shape: Shape of one output.
        compute: Maps B samples to outputs (B, *shape).
        batch: Samples per call of `compute`. Default: 32.

    Returns:
        The outputs, (N, *shape) float16, memory-mapped.
    """
    whole = (len(samples), *shape)

    def read_or_write() -> np.ndarray:
        found = read_sealed(path, whole, np.float16)
        if found is not None:
            return found
        starts = range(0, len(samples), batch)
        bar = progress_bar(len(starts), iterable=starts, desc=f"compute {path.name}")
        blocks = (compute(samples[start : start + batch]).half().cpu().numpy() for start in bar)
        write_array(path, whole, np.float16, blocks, sealed=True)
        return np.load(path, mmap_mode="r")

    return current_processes().in_turn(read_or_write)
