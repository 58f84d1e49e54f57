"""DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, algorithm 1): the midpoint in log rho, second order.

With y = x/alpha, rho = sigma/alpha and dy/d rho = eps, one step is

    rho_m = sqrt(rho·rho'),   y_m = y + (rho_m − rho)·eps
    y' = y + (rho' − rho)·eps_m,   eps_m evaluated at y_m and rho_m

A step to clean data or from pure noise is Euler's. Churn first raises the noise level; see
`ldm.samplers.churn`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.churn import Churn
from ldm.samplers.common import (
    alphas_sigmas,
    call_on_step,
    noise_ratio,
    state_of_ratio,
    step_const_eps,
    step_const_x0,
)


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
    """Sample with DPM-Solver-2 (Lu et al. 2022, algorithm 1), two evaluations per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source, required if s_churn > 0; draw i is that of step i. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        s_churn: Amount of noise added over the whole run, at least 0. Default: 0.
        s_min: Smallest sigma/alpha at which noise is added. Default: 0.
        s_max: Largest sigma/alpha at which noise is added. Default: inf.
        s_noise: Standard deviation of the added noise, at least 0. Default: 1.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If s_churn or s_noise is negative, or noise is missing while s_churn > 0.
    """
    churn = Churn(s_churn, s_min, s_max, s_noise, noise, "dpm2")
    alpha, sigma = alphas_sigmas(grid)
    for i in range(len(grid)):
        rho_next = noise_ratio(alpha[i + 1], sigma[i + 1])
        x, t, alpha_hat, sigma_hat, rho_hat = churn(x, i, grid)
        d = denoise(x, t)
        if sigma[i + 1] == 0 or alpha_hat == 0:
            x = step_const_x0(x, d.x0, sigma_hat, rho_hat, alpha[i + 1], rho_next)
        else:
            x = midpoint_step(denoise, x, d.eps, grid, alpha_hat, rho_hat, alpha[i + 1], rho_next)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x


def midpoint_step(
    denoise: DenoiseFn,
    x: Tensor,
    eps: Tensor,
    grid: TimeGrid,
    alpha: float,
    rho: float,
    alpha_next: float,
    rho_next: float,
) -> Tensor:
    """Return the step from rho to rho' with eps evaluated at their geometric mean.

    Args:
        denoise: The denoiser.
        x: The state, shape (B, *S).
        eps: The estimate of the noise at x, shape (B, *S).
        grid: The time grid, which gives t of the midpoint.
        alpha: alpha of the state, positive.
        rho: sigma/alpha of the state.
        alpha_next: alpha of the next state.
        rho_next: sigma/alpha of the next state, positive.
    """
    rho_mid = math.sqrt(rho * rho_next)
    alpha_mid, _ = state_of_ratio(rho_mid)
    middle = step_const_eps(x, eps, alpha, rho, alpha_mid, rho_mid)
    eps_mid = denoise(middle, grid.time(math.log(rho_mid))).eps
    return step_const_eps(x, eps_mid, alpha, rho, alpha_next, rho_next)
