"""DDPM: ancestral sampling from the posterior (Ho et al. 2020, arXiv:2006.11239, eq. 7, algorithm 2).

With beta = 1 − alpha²/alpha'² the variance added by the forward process from x' to x, one step is

    x' = alpha'·beta/sigma²·x0 + (alpha/alpha')·(sigma'²/sigma²)·x + s·z

s² is the posterior's variance beta·sigma'²/sigma² (small), beta (large), or lies between them in the
logarithm at the network's `var_frac` (learned; Improved DDPM, arXiv:2102.09672, eq. 15). A step to clean data
adds no noise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, check_choice, require_noise


def ddpm(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    variance: Literal["small", "large", "learned"] = "small",
) -> Tensor:
    """Sample with DDPM (Ho et al. 2020, algorithm 2), one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source; draw i is that of step i. Required.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        variance: Variance of the noise: "small", "large", or "learned". Default: "small".

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If noise is missing, the variance is unknown, or it is "learned" and the network predicts
            none.
    """
    check_choice(variance, ("small", "large", "learned"), "variance")
    draw = require_noise(noise, "ddpm")
    alpha, sigma = alphas_sigmas(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        ratio = alpha[i] / alpha[i + 1]
        beta = 1 - ratio**2
        small = beta * (sigma[i + 1] / sigma[i]) ** 2
        x = alpha[i + 1] * beta / sigma[i] ** 2 * d.x0 + ratio * (sigma[i + 1] / sigma[i]) ** 2 * x
        if sigma[i + 1] > 0:
            x = x + _standard_deviation(variance, small, beta, d.var_frac) * draw(i, x)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x


def _standard_deviation(variance: str, small: float, beta: float, var_frac: Tensor | None) -> Tensor | float:
    """Return s, the standard deviation of the noise of a step; a tensor (B, *S) if it is learned."""
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
