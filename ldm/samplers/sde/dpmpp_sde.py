"""DPM-Solver++ (SDE): a stochastic midpoint method, two evaluations and two draws a step."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, ancestral, demand, of_ratio, ratio, states, toward, within


def dpmpp_sde(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """An ancestral step to the inner level rho^(1 − r)·rho'^r, then from the start with x0 extrapolated from
    both  (arXiv:2211.01095, section 5).

    Draw 2i is the inner stage's of step i, draw 2i + 1 the step's own. eta in [0, 1], r in (0, 1]. A step to
    clean data, or from pure noise, is of order 1.
    """
    within(eta, 0, 1, "eta")
    if not 0 < r <= 1:
        raise ValueError(f"r must lie in (0, 1], got {r}")
    draw = demand(noise, "dpmpp_sde") if eta > 0 else None
    alpha, sigma = states(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = ratio(alpha[i], sigma[i]), ratio(alpha[i + 1], sigma[i + 1])
        x0 = d.x0
        if alpha[i] > 0 and rho_next > 0:
            rho_mid = rho ** (1 - r) * rho_next**r
            alpha_mid, _ = of_ratio(rho_mid)
            down, up = ancestral(rho, rho_mid, eta)
            middle = toward(x, d.x0, sigma[i], rho, alpha_mid, down)
            if draw is not None and up > 0:
                middle = middle + alpha_mid * up * s_noise * draw(2 * i, x)
            inner = denoise(middle, grid.time(math.log(rho_mid))).x0
            x0 = (1 - 1 / (2 * r)) * d.x0 + 1 / (2 * r) * inner
        down, up = ancestral(rho, rho_next, eta)
        x = toward(x, x0, sigma[i], rho, alpha[i + 1], down)
        if draw is not None and up > 0:
            x = x + alpha[i + 1] * up * s_noise * draw(2 * i + 1, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
