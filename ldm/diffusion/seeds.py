"""Seeds: one for each sample of a call."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from ldm.support.scalars import python_scalar

LARGEST = 2**63 - 1


def check_seeds(seed: int | Sequence[int] | None, n: int) -> tuple[int, ...]:
    """Return the seeds of n samples.

    Args:
        seed: A number s in [0, 2**63 − n], for the seeds s, s + 1, …; a sequence of n seeds; or None, for a
            random s below 2**32.
        n: Number of samples.

    Raises:
        ValueError: If a seed is not a whole number or out of range, or the sequence has another length.
    """
    seed = secrets.randbelow(2**32) if seed is None else python_scalar(seed)
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not 0 <= seed <= LARGEST + 1 - n:
            raise ValueError(f"seed: expected 0 to 2**63 - {n}, got {seed}")
        return tuple(range(seed, seed + n))
    if isinstance(seed, bool | float | str) or not hasattr(seed, "__len__"):
        raise ValueError(f"seed: expected a whole number, {n} of them, or None, got {seed!r}")
    seeds = tuple(python_scalar(each) for each in seed)
    if len(seeds) != n:
        raise ValueError(f"seed: {len(seeds)} seeds for {n} images")
    for each in seeds:
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each <= LARGEST:
            raise ValueError(f"seed: expected whole numbers from 0 to 2**63 - 1, got {each!r}")
    return seeds
