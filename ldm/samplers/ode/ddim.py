"""DDIM: the deterministic step, or with eta > 0 a stochastic one."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, demand, states


def ddim(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """x' = alpha'·x0 + sqrt(sigma'² − s²)·eps + s·z with s = eta·(sigma'/sigma)·sqrt(1 − alpha²/alpha'²)
    (arXiv:2010.02502, eq. 12, 16).

    eta in [0, 1]: 0 is deterministic, 1 has the DDPM posterior's variance.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    draw = demand(noise, "ddim with eta > 0") if eta > 0 else None
    alpha, sigma = states(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        s = eta * sigma[i + 1] / sigma[i] * math.sqrt(1 - (alpha[i] / alpha[i + 1]) ** 2)
        x = alpha[i + 1] * d.x0 + math.sqrt(sigma[i + 1] ** 2 - s**2) * d.eps
        if draw is not None and s > 0:
            x = x + s * draw(i, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
