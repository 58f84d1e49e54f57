"""Named combinations of the approximations of `ldm.optimize`, with errors and times in docs/speed.md."""

from __future__ import annotations

from typing import NamedTuple

from ldm.support.config import nearest


class Approximations(NamedTuple):
    """The options of `ldm.optimize` that change results.

    Attributes:
        reuse: Steps per full evaluation of the denoiser.
        branch: Blocks at the denoiser's beginning that are computed in every step.
        merge: Fraction of the positions that are merged.
        int8: Whether the UNet's products are in 8 bits.
    """

    reuse: int = 1
    branch: int = 0
    merge: float = 0.0
    int8: bool = False


SPEED_PRESETS = {
    "exact": Approximations(),
    "fast": Approximations(reuse=10, branch=1),
    "fastest": Approximations(reuse=10, branch=1, merge=0.5),
}


def settled(preset: str | None, given: Approximations) -> Approximations:
    """Return the approximations of a preset, or those given without one.

    Raises:
        ValueError: If there is no such preset, or options are given beside it.
    """
    if preset is None:
        return given
    if preset not in SPEED_PRESETS:
        raise ValueError(f"preset {preset!r}: {nearest(preset, SPEED_PRESETS)}")
    if given != Approximations():
        changed = [
            name for name, value in given._asdict().items() if value != getattr(Approximations(), name)
        ]
        raise ValueError(
            f"preset {preset!r} chooses reuse, branch, merge and int8; given besides: {', '.join(changed)}"
        )
    return SPEED_PRESETS[preset]
