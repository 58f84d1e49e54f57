"""TCD: trajectory consistency sampling, strategic noise (Zheng et al. 2024, arXiv:2402.19159, algorithm 4).

With gamma = eta, one step goes to a time s below t' and is then noised up to t':

    s  = floor((1 − eta)·t')
    x_s = alpha_s·x0 + sigma_s·eps
    x' ~ q(x' | x_s) = (alpha'/alpha_s)·x_s + sqrt(sigma'² − (alpha'/alpha_s)²·sigma_s²)·z

eta = 0 is DDIM; eta = 1 adds noise from the schedule's entry 0. A step to clean data adds no noise.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, check_range, renoise, require_noise


def tcd(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.3,
) -> Tensor:
    """Sample with a trajectory consistency model (Zheng et al. 2024, algorithm 4), one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source, required if eta > 0; draw i is that of step i. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        eta: Amount of noise, the paper's gamma, in [0, 1]; 0 is deterministic. Default: 0.3.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If eta is out of range, or noise is missing while eta > 0.
    """
    check_range(eta, 0, 1, "eta")
    draw = require_noise(noise, "tcd with eta > 0") if eta > 0 else None
    alpha, sigma = alphas_sigmas(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        if draw is None or i + 1 == len(grid):
            x = alpha[i + 1] * d.x0 + sigma[i + 1] * d.eps
        else:
            s = math.floor((1 - eta) * float(grid.t[i + 1]))
            alpha_s, sigma_s = (float(value) for value in grid.schedule.alpha_sigma(s))
            x_s = alpha_s * d.x0 + sigma_s * d.eps
            x = renoise(x_s, draw(i, x_s), alpha_s, sigma_s, alpha[i + 1], sigma[i + 1])
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
