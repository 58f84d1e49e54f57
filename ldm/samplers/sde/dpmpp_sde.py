"""DPM-Solver++ (SDE): a stochastic midpoint method (Lu et al. 2022, arXiv:2211.01095, section 5).

With rho = sigma/alpha, one step is

    rho_m = rho^(1 − r)·rho'^r
    x_m = an ancestral step from rho to rho_m with x0
    x'  = an ancestral step from rho to rho' with (1 − 1/(2r))·x0 + 1/(2r)·x0_m (evaluated at x_m, rho_m)

An ancestral step with x0 goes to rho_down exactly for constant x0 and adds noise rho_up, as in `euler_a`. A
step to clean data or from pure noise is of order 1.
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
    """Sample with DPM-Solver++ (SDE) (Lu et al. 2022, section 5), two evaluations and two draws per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source, required if eta > 0; draw 2i is that of step i's inner stage, draw 2i + 1
            that of the step itself. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        eta: Amount of noise added per step, in [0, 1]; 0 is deterministic. Default: 1.
        s_noise: Factor of the noise's standard deviation. Default: 1.
        r: Position of the inner stage in lambda, in (0, 1]. Default: 0.5.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If eta or r is out of range, or noise is missing while eta > 0.
    """
    check_range(eta, 0, 1, "eta")
    if not 0 < r <= 1:
        raise ValueError(f"r must lie in (0, 1], got {r}")
    draw = require_noise(noise, "dpmpp_sde") if eta > 0 else None
    alpha, sigma = alphas_sigmas(grid)

    def ancestral_step(
        x: Tensor, x0: Tensor, sigma: float, rho: float, alpha_next: float, rho_next: float, k: int
    ) -> Tensor:
        rho_down, rho_up = ancestral_split(rho, rho_next, eta)
        x = step_const_x0(x, x0, sigma, rho, alpha_next, rho_down)
        return x + alpha_next * rho_up * s_noise * draw(k, x) if draw is not None and rho_up > 0 else x

    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        x0 = d.x0
        rho, rho_next = noise_ratio(alpha[i], sigma[i]), noise_ratio(alpha[i + 1], sigma[i + 1])
        if alpha[i] > 0 and rho_next > 0:
            rho_mid = rho ** (1 - r) * rho_next**r
            middle = ancestral_step(x, x0, sigma[i], rho, state_of_ratio(rho_mid)[0], rho_mid, 2 * i)
            x0_mid = denoise(middle, grid.time(math.log(rho_mid))).x0
            x0 = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * x0_mid
        x = ancestral_step(x, x0, sigma[i], rho, alpha[i + 1], rho_next, 2 * i + 1)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
