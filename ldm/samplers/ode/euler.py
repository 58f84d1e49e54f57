"""Euler: the probability flow's first-order step, with Karras et al.'s optional churn."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.churn import Churn
from ldm.samplers.common import after, ratio, states, time_of, toward


def euler(
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
    """y' = y + (rho' − rho)·(y − x0)/rho with y = x/alpha, rho = sigma/alpha  (arXiv:2206.00364, algorithm 2
    without its correction).

    ``s_churn`` > 0 first raises the noise level, where rho lies in [s_min, s_max], with noise of deviation
    s_noise. Without churn this is DDIM.
    """
    churn = Churn(s_churn, s_min, s_max, s_noise, noise, "euler")
    alpha, sigma = states(grid)
    for i in range(len(grid)):
        rho_next = ratio(alpha[i + 1], sigma[i + 1])
        x, t, _, sigma_hat, rho = churn.raised(x, i, grid, alpha[i], sigma[i], time_of(grid, i))
        d = denoise(x, t)
        x = toward(x, d.x0, sigma_hat, rho, alpha[i + 1], rho_next)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
