"""TCD: trajectory consistency sampling with strategic noise."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, demand, states, within


def tcd(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.3,
) -> Tensor:
    """A deterministic step to time s = floor((1 − eta)·t'), then forward noising from s to t'
    (arXiv:2402.19159, algorithm 4, gamma = eta).

    eta in [0, 1]: 0 is DDIM, 1 noises afresh from the schedule's first entry. A step to clean data adds no
    noise.
    """
    within(eta, 0, 1, "eta")
    draw = demand(noise, "tcd with eta > 0") if eta > 0 else None
    alpha, sigma = states(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        alpha_s, sigma_s = alpha[i + 1], sigma[i + 1]
        if draw is not None and i + 1 < len(grid):
            s = math.floor((1 - eta) * float(grid.t[i + 1]))
            alpha_s, sigma_s = (float(value) for value in grid.schedule.alpha_sigma(s))
        x = alpha_s * d.x0 + sigma_s * d.eps
        if draw is not None and i + 1 < len(grid):
            keep = alpha[i + 1] / alpha_s
            x = keep * x + math.sqrt(1 - keep**2) * draw(i, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
