"""DPM-Solver++(2M) SDE: a stochastic multistep method, one evaluation a step."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, choose, demand, lam, states


def dpmpp_2m_sde(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
) -> Tensor:
    """x' = (sigma'/sigma)·e^(−eta·h)·x + alpha'·(1 − e^(−(1 + eta)·h))·D + sigma'·sqrt(1 − e^(−2·eta·h))·z
    (arXiv:2211.01095, section 5).

    D extrapolates x0 from the last two evaluations, to the step's middle or as Heun does. eta >= 0; 0 is
    deterministic. A step to clean data or from pure noise, and the one after it, is of order 1.
    """
    choose(solver, ("midpoint", "heun"), "solver")
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    draw = demand(noise, "dpmpp_2m_sde") if eta > 0 else None
    alpha, sigma = states(grid)
    lams = [lam(a, s) for a, s in zip(alpha, sigma, strict=True)]
    last_x0: Tensor | None = None
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        h = lams[i + 1] - lams[i]
        k = (1 + eta) * h
        keep, gain = math.exp(-eta * h) if eta else 1.0, -math.expm1(-k)
        x = sigma[i + 1] / sigma[i] * keep * x + alpha[i + 1] * gain * d.x0
        if last_x0 is not None and math.isfinite(h) and math.isfinite(lams[i - 1]):
            r = (lams[i] - lams[i - 1]) / h
            weight = gain / 2 if solver == "midpoint" else 1 - gain / k
            x = x + alpha[i + 1] * weight / r * (d.x0 - last_x0)
        if draw is not None and sigma[i + 1] > 0:
            x = x + sigma[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise * draw(i, x)
        last_x0 = d.x0
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
