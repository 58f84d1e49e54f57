"""DPM-Solver++(2M) SDE: a stochastic multistep method (Lu et al. 2022, arXiv:2211.01095, section 5).

With lambda = log(alpha/sigma), h = lambda' − lambda and r = h_last/h, one step is

    x' = (sigma'/sigma)·e^(−eta·h)·x + alpha'·(g·x0 + w/r·(x0 − x0_last)) + sigma'·sqrt(1 − e^(−2·eta·h))·z
    g = 1 − e^(−k),   k = (1 + eta)·h
    w = g/2 (midpoint: x0 extrapolated to the middle of the step) or 1 − g/k (heun: x0 linear over the step)

A step to clean data or from pure noise, and the one after it, is of order 1 (w = 0).
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, check_choice, half_log_snrs, require_noise


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
    """Sample with DPM-Solver++(2M) SDE (Lu et al. 2022, section 5), one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source, required if eta > 0; draw i is that of step i. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        eta: Amount of noise added per step, at least 0; 0 is deterministic, 1 the reverse SDE. Default: 1.
        s_noise: Factor of the noise's standard deviation. Default: 1.
        solver: How x0 is extrapolated: "midpoint" or "heun". Default: "midpoint".

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If eta is negative, the solver is unknown, or noise is missing while eta > 0.
    """
    check_choice(solver, ("midpoint", "heun"), "solver")
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    draw = require_noise(noise, "dpmpp_2m_sde") if eta > 0 else None
    (alpha, sigma), lam = alphas_sigmas(grid), half_log_snrs(grid)
    last_x0: Tensor | None = None
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        h = lam[i + 1] - lam[i]
        k = (1 + eta) * h
        decay, gain = math.exp(-eta * h) if eta else 1.0, -math.expm1(-k)
        x = sigma[i + 1] / sigma[i] * decay * x + alpha[i + 1] * gain * d.x0
        if last_x0 is not None and math.isfinite(h) and math.isfinite(lam[i - 1]):
            r = (lam[i] - lam[i - 1]) / h
            weight = gain / 2 if solver == "midpoint" else 1 - gain / k
            x = x + alpha[i + 1] * weight / r * (d.x0 - last_x0)
        if draw is not None and sigma[i + 1] > 0:
            x = x + sigma[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise * draw(i, x)
        last_x0 = d.x0
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
