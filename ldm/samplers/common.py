"""What every sampler needs: the coefficients as numbers, the step hook, the demand for noise."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.grid import TimeGrid
from ldm.types import Denoised, NoiseFn, OnStep


def states(grid: TimeGrid) -> tuple[list[float], list[float]]:
    """alpha and sigma of the N + 1 states as Python floats: they multiply tensors of any dtype, at full precision themselves."""
    return grid.alpha.tolist(), grid.sigma.tolist()


def lam(alpha: float, sigma: float) -> float:
    """log(alpha/sigma), +inf at clean data and −inf at pure noise."""
    if sigma == 0:
        return math.inf
    return math.log(alpha / sigma) if alpha > 0 else -math.inf


def after(on_step: OnStep | None, i: int, x: Tensor, d: Denoised) -> tuple[Tensor, bool]:
    """The state after the caller's hook, and whether the hook ended the run."""
    if on_step is None:
        return x, False
    try:
        changed = on_step(i, x, d)
    except StopIteration:
        return x, True
    return (x if changed is None else changed), False


def demand(noise: NoiseFn | None, sampler: str) -> NoiseFn:
    """The noise, or ValueError if there is none."""
    if noise is None:
        raise ValueError(f"{sampler} draws noise at its steps: give noise, e.g. ldm.noise.keyed_noise(seeds)")
    return noise


def choose(value: str, choices: tuple[str, ...], what: str) -> None:
    """ValueError if ``value`` is none of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choices: {', '.join(choices)}")
