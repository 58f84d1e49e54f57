"""DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16).

With x0 and eps estimated at x, and z standard normal noise, one step is

    x' = alpha'·x0 + sqrt(sigma'² − s²)·eps + s·z,   s = eta·(sigma'/sigma)·sqrt(1 − alpha²/alpha'²)

eta = 0 is deterministic: the exact step of the probability-flow ODE for constant eps. eta = 1 has the
variance of DDPM's posterior.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, check_range, require_noise


def ddim(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Sample with DDIM (Song et al. 2021, eq. 12), one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source, required if eta > 0; draw i is that of step i. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        eta: Amount of noise added per step, in [0, 1]; 0 is deterministic, 1 is DDPM's posterior. Default: 0.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If eta is out of range, or noise is missing while eta > 0.
    """
    check_range(eta, 0, 1, "eta")
    draw = require_noise(noise, "ddim with eta > 0") if eta > 0 else None
    alpha, sigma = alphas_sigmas(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        s = eta * sigma[i + 1] / sigma[i] * math.sqrt(1 - (alpha[i] / alpha[i + 1]) ** 2)
        x = alpha[i + 1] * d.x0 + math.sqrt(sigma[i + 1] ** 2 - s**2) * d.eps
        if draw is not None and s > 0:
            x = x + s * draw(i, x)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
