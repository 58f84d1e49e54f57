"""Heun: Karras et al.'s second-order sampler, two evaluations a step."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.churn import Churn
from ldm.samplers.common import after, along, ratio, states, time_of, toward


def heun(
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
    """y' = y + (rho' − rho)·(eps + eps')/2, eps' taken at the Euler step's end  (arXiv:2206.00364, algorithm
    1; with churn 2).

    A step to clean data, or from pure noise, is Euler's.
    """
    churn = Churn(s_churn, s_min, s_max, s_noise, noise, "heun")
    alpha, sigma = states(grid)
    for i in range(len(grid)):
        rho_next = ratio(alpha[i + 1], sigma[i + 1])
        x, t, alpha_hat, sigma_hat, rho = churn.raised(x, i, grid, alpha[i], sigma[i], time_of(grid, i))
        d = denoise(x, t)
        end = toward(x, d.x0, sigma_hat, rho, alpha[i + 1], rho_next)
        if sigma[i + 1] > 0 and alpha_hat > 0:
            eps = (d.eps + denoise(end, time_of(grid, i + 1)).eps) / 2
            end = along(x, eps, alpha_hat, rho, alpha[i + 1], rho_next)
        x, stop = after(on_step, i, end, d)
        if stop:
            break
    return x
