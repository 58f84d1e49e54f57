"""DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order, one evaluation per step.

With lambda = log(alpha/sigma) and h = lambda' − lambda, the step with x0 extrapolated to the middle of the
step is

    x' = (sigma'/sigma)·x − alpha'·(e^(−h) − 1)·D
    D  = (1 + 1/(2r))·x0 − 1/(2r)·x0_last,   r = h_last/h

The first step is of order 1 (D = x0), and so is a step from or to an infinite lambda (pure noise, clean data)
and the one after a step from pure noise.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, half_log_snrs


def dpmpp_2m(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """Sample with DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: Not used. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        lower_order_final: Whether the last step is of order 1. Default: False.

    Returns:
        The state at the last grid entry, shape (B, *S).
    """
    alpha, sigma = alphas_sigmas(grid)
    lam = half_log_snrs(grid)
    last_x0: Tensor | None = None
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        h = lam[i + 1] - lam[i]
        first_order = math.isinf(h) or (lower_order_final and i == len(grid) - 1)
        D = d.x0
        if last_x0 is not None and not first_order and not math.isinf(lam[i - 1]):
            r = (lam[i] - lam[i - 1]) / h
            D = (1 + 1 / (2 * r)) * d.x0 - 1 / (2 * r) * last_x0
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * D
        last_x0 = d.x0
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
