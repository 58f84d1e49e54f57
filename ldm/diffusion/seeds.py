"""Seeds: one for each sample of a call."""

from __future__ import annotations

from collections.abc import Sequence


def check_seeds(seed: int | Sequence[int], n: int) -> tuple[int, ...]:
    """Return the seeds of n samples.

    Args:
        seed: A number s in [0, 2**63 − n], for the seeds s, s + 1, …; or a sequence of n seeds.
        n: Number of samples.

    Raises:
        ValueError: If the number is out of range or the sequence has another length.
    """
    if isinstance(seed, int):
        if not 0 <= seed <= 2**63 - n:
            raise ValueError(f"seed: expected 0 to 2**63 - {n}, got {seed}")
        return tuple(range(seed, seed + n))
    seeds = tuple(int(s) for s in seed)
    if len(seeds) != n:
        raise ValueError(f"seed: {len(seeds)} seeds for {n} images")
    return seeds
