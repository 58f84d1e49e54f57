"""DDPM: ancestral sampling from the posterior, on any grid."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, choose, demand, states


def ddpm(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    variance: Literal["small", "large", "learned"] = "small",
) -> Tensor:
    """x' ~ N(posterior mean of (x0, x), variance), with the betas of the grid's own steps  (arXiv:2006.11239,
    eq. 7, algorithm 2).

    ``small`` is the posterior's variance beta·sigma'²/sigma², ``large`` beta, ``learned`` lies between them
    in the logarithm, at the network's ``var_frac`` (arXiv:2102.09672, eq. 15). A step to clean data adds no
    noise.
    """
    choose(variance, ("small", "large", "learned"), "variance")
    draw = demand(noise, "ddpm")
    alpha, sigma = states(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        step = alpha[i] / alpha[i + 1]
        beta = 1 - step**2
        small = beta * (sigma[i + 1] / sigma[i]) ** 2
        x = alpha[i + 1] * beta / sigma[i] ** 2 * d.x0 + step * (sigma[i + 1] / sigma[i]) ** 2 * x
        if sigma[i + 1] > 0:
            x = x + _deviation(variance, small, beta, d.var_frac) * draw(i, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x


def _deviation(variance: str, small: float, beta: float, var_frac: Tensor | None) -> Tensor | float:
    if variance == "small":
        return math.sqrt(small)
    if variance == "large":
        return math.sqrt(beta)
    if var_frac is None:
        raise ValueError(
            "variance 'learned' needs a network that predicts one (Denoiser(…, learned_var=True)); use"
            " 'small' or 'large'"
        )
    return torch.exp(0.5 * (var_frac * math.log(beta) + (1 - var_frac) * math.log(small)))
