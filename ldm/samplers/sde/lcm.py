"""LCM: multistep consistency sampling."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, demand, states


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
    """f = c_skip·x + c_out·x0, then x' = alpha'·f + sigma'·z: each step denoises wholly and noises afresh
    (arXiv:2310.04378, algorithm 3).

    c_skip = sd²/(s² + sd²), c_out = s/sqrt(s² + sd²) with s = timestep_scale·t, sd = sigma_data.
    """
    draw = demand(noise, "lcm") if len(grid) > 1 or float(grid.sigma[-1]) > 0 else None
    alpha, sigma = states(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        s = timestep_scale * float(t)
        clean = sigma_data**2 / (s**2 + sigma_data**2) * x + s / math.sqrt(s**2 + sigma_data**2) * d.x0
        x = alpha[i + 1] * clean
        if draw is not None and sigma[i + 1] > 0:
            x = x + sigma[i + 1] * draw(i, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
