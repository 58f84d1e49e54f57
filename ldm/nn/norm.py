"""Group normalisation as this family of networks uses it."""

from __future__ import annotations

import math


def group_norm_32(channels: int) -> int:
    """The number of groups: 32 wherever the channels allow it, as in every published model; for narrower networks the largest divisor of both."""
    return math.gcd(32, channels)
