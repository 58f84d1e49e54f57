"""Euler ancestral: an Euler step below the next noise level, then noise up to it.

With y = x/alpha and rho = sigma/alpha, one step is

    rho_down² + rho_up² = rho'²,   rho_up = min(rho', eta·rho'·sqrt(1 − rho'²/rho²))
    y' = y + (rho_down − rho)·(y − x0)/rho + rho_up·z

This is DDIM's stochastic step in another parameterisation (Song et al. 2021, arXiv:2010.02502, eq. 12): eta =
0 is Euler's, eta = 1 has the variance of DDPM's posterior.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import (
    alphas_sigmas,
    ancestral_split,
    call_on_step,
    check_range,
    noise_ratio,
    require_noise,
    step_const_x0,
)


def euler_a(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Sample with Euler's ancestral method, one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source, required if eta > 0; draw i is that of step i. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        eta: Amount of noise added per step, in [0, 1]; 0 is deterministic. Default: 1.
        s_noise: Factor of the noise's standard deviation. Default: 1.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If eta is out of range, or noise is missing while eta > 0.
    """
    check_range(eta, 0, 1, "eta")
    draw = require_noise(noise, "euler_a") if eta > 0 else None
    alpha, sigma = alphas_sigmas(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = noise_ratio(alpha[i], sigma[i]), noise_ratio(alpha[i + 1], sigma[i + 1])
        rho_down, rho_up = ancestral_split(rho, rho_next, eta)
        x = step_const_x0(x, d.x0, sigma[i], rho, alpha[i + 1], rho_down)
        if draw is not None and rho_up > 0:
            x = x + alpha[i + 1] * rho_up * s_noise * draw(i, x)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
