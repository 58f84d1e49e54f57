"""Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 2).

With y = x/alpha, rho = sigma/alpha and dy/d rho = eps = (y − x0)/rho, one step is

    y' = y + (rho' − rho)·(y − x0)/rho

Without churn this is DDIM with eta = 0. Churn first raises the noise level; see `ldm.samplers.churn`.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.churn import Churn
from ldm.samplers.common import alphas_sigmas, call_on_step, noise_ratio, step_const_x0


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
    """Sample with Euler's method (Karras et al. 2022, algorithm 2), one evaluation per step.

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
    churn = Churn(s_churn, s_min, s_max, s_noise, noise, "euler")
    alpha, sigma = alphas_sigmas(grid)
    for i in range(len(grid)):
        rho_next = noise_ratio(alpha[i + 1], sigma[i + 1])
        x, t, _, sigma_hat, rho_hat = churn(x, i, grid)
        d = denoise(x, t)
        x = step_const_x0(x, d.x0, sigma_hat, rho_hat, alpha[i + 1], rho_next)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
