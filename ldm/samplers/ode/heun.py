"""Heun's method on the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2).

With y = x/alpha, rho = sigma/alpha and dy/d rho = eps, one step is

    y_e = y + (rho' − rho)·eps                    (Euler)
    y'  = y + (rho' − rho)·(eps + eps_e)/2        (trapezoidal rule, eps_e evaluated at y_e and rho')

A step to clean data or from pure noise is Euler's. Churn first raises the noise level; see
`ldm.samplers.churn`.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.churn import Churn
from ldm.samplers.common import alphas_sigmas, call_on_step, noise_ratio, step_const_eps, step_const_x0


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
    """Sample with Heun's second-order method (Karras et al. 2022, algorithm 2), two evaluations per step.

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
    churn = Churn(s_churn, s_min, s_max, s_noise, noise, "heun")
    alpha, sigma = alphas_sigmas(grid)
    for i in range(len(grid)):
        rho_next = noise_ratio(alpha[i + 1], sigma[i + 1])
        x, t, alpha_hat, sigma_hat, rho_hat = churn(x, i, grid)
        d = denoise(x, t)
        end = step_const_x0(x, d.x0, sigma_hat, rho_hat, alpha[i + 1], rho_next)
        if sigma[i + 1] > 0 and alpha_hat > 0:
            eps = (d.eps + denoise(end, grid.time_of_state(i + 1)).eps) / 2
            end = step_const_eps(x, eps, alpha_hat, rho_hat, alpha[i + 1], rho_next)
        x, stop = call_on_step(on_step, i, end, d)
        if stop:
            break
    return x
