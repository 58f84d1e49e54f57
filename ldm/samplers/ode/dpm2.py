"""DPM-Solver-2: the midpoint in log sigma, two evaluations a step."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.churn import Churn
from ldm.samplers.common import after, along, of_ratio, ratio, states, time_of, toward


def dpm2(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """y' = y + (rho' − rho)·eps_m, eps_m at the geometric mean of rho and rho'  (arXiv:2206.00927, algorithm
    1).

    A step to clean data, or from pure noise, is Euler's. Churn as in ``heun``.
    """
    churn = Churn(s_churn, s_min, s_max, s_noise, noise, "dpm2")
    alpha, sigma = states(grid)
    for i in range(len(grid)):
        rho_next = ratio(alpha[i + 1], sigma[i + 1])
        x, t, alpha_hat, sigma_hat, rho = churn.raised(x, i, grid, alpha[i], sigma[i], time_of(grid, i))
        d = denoise(x, t)
        if sigma[i + 1] == 0 or alpha_hat == 0:
            x = toward(x, d.x0, sigma_hat, rho, alpha[i + 1], rho_next)
        else:
            x = midpoint(denoise, x, d.eps, grid, alpha_hat, rho, alpha[i + 1], rho_next)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x


def midpoint(
    denoise: DenoiseFn,
    x: Tensor,
    eps: Tensor,
    grid: TimeGrid,
    alpha: float,
    rho: float,
    alpha_next: float,
    rho_next: float,
) -> Tensor:
    """From rho to rho' with the slope at their geometric mean."""
    rho_mid = math.sqrt(rho * rho_next)
    alpha_mid, _ = of_ratio(rho_mid)
    middle = along(x, eps, alpha, rho, alpha_mid, rho_mid)
    return along(x, denoise(middle, grid.time(math.log(rho_mid))).eps, alpha, rho, alpha_next, rho_next)
