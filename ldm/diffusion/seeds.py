"""Seeds: one for each sample of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def check_seeds(seed: int | Sequence[int], n: int) -> tuple[int, ...]:
    """n seeds: seed, seed + 1, … for a number; as given for a sequence of n. ValueError if they do not
    fit."""
    if isinstance(seed, int):
        if not 0 <= seed <= 2**63 - n:
            raise ValueError(f"seed: expected 0 to 2**63 - {n}, got {seed}")
        return tuple(range(seed, seed + n))
    seeds = tuple(int(s) for s in seed)
    if len(seeds) != n:
        raise ValueError(f"seed: {len(seeds)} seeds for {n} pictures")
    return seeds
