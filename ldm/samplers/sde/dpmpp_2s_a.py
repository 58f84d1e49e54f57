"""DPM-Solver++(2S) with ancestral noise: x0 at the midpoint in lambda, then noise up to the next level.

With rho = sigma/alpha and lambda = −log rho, one step is (Lu et al. 2022, arXiv:2211.01095, algorithm 1, r =
1/2)

    rho_down² + rho_up² = rho'²,   rho_m = sqrt(rho·rho_down)
    x_m = the exact step from rho to rho_m for constant x0
    x'  = the exact step from rho to rho_down for constant x0_m (evaluated at x_m, rho_m) + alpha'·rho_up·z

The step is of order 1 from pure noise, and where rho_m is below the schedule's smallest level, because the
network was not trained there.
"""

from __future__ import annotations

import math

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
    state_of_ratio,
    step_const_x0,
)


def dpmpp_2s_a(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Sample with DPM-Solver++(2S) and ancestral noise, two evaluations per step.

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
    draw = require_noise(noise, "dpmpp_2s_a") if eta > 0 else None
    alpha, sigma = alphas_sigmas(grid)
    least = float(grid.schedule.log_ratio[0].exp())  # the schedule's smallest rho
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        x0 = d.x0
        rho, rho_next = noise_ratio(alpha[i], sigma[i]), noise_ratio(alpha[i + 1], sigma[i + 1])
        rho_down, rho_up = ancestral_split(rho, rho_next, eta)
        if alpha[i] > 0 and rho * rho_down > least**2 * (1 - 1e-9):
            rho_mid = math.sqrt(rho * rho_down)
            middle = step_const_x0(x, x0, sigma[i], rho, state_of_ratio(rho_mid)[0], rho_mid)
            x0 = denoise(middle, grid.time(math.log(rho_mid))).x0
        x = step_const_x0(x, x0, sigma[i], rho, alpha[i + 1], rho_down)
        if draw is not None and rho_up > 0:
            x = x + alpha[i + 1] * rho_up * s_noise * draw(i, x)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
