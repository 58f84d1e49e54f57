"""LCM: multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

The consistency function f maps a state to clean data; one step evaluates it and adds noise of the next level:

    f  = c_skip·x + c_out·x0,   c_skip = sd²/(s² + sd²),   c_out = s/sqrt(s² + sd²),   s = timestep_scale·t
    x' = alpha'·f + sigma'·z

with sd = sigma_data. A step to clean data adds no noise. The state at t = 0 has the noise of the table's
first entry, which c_skip = 1 would keep: below t = 1, f = x0.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, require_noise


def lcm(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    timestep_scale: float = 10.0,
    sigma_data: float = 0.5,
) -> Tensor:
    """Sample with a latent consistency model (Luo et al. 2023, algorithm 3), one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source; draw i is that of step i. Required unless the grid is one step to clean data.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        timestep_scale: Factor of t in c_skip and c_out. Default: 10.
        sigma_data: Standard deviation of the data in c_skip and c_out. Default: 0.5.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If noise is missing.
    """
    draw = require_noise(noise, "lcm") if len(grid) > 1 or float(grid.sigma[-1]) > 0 else None
    alpha, sigma = alphas_sigmas(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        s = timestep_scale * float(t)
        c_skip, c_out = sigma_data**2 / (s**2 + sigma_data**2), s / math.sqrt(s**2 + sigma_data**2)
        if float(t) < 1:
            c_skip, c_out = 0.0, 1.0
        x = alpha[i + 1] * (c_skip * x + c_out * d.x0)
        if draw is not None and sigma[i + 1] > 0:
            x = x + sigma[i + 1] * draw(i, x)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
