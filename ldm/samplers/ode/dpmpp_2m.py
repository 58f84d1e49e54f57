"""DPM-Solver++(2M): second order, one evaluation a step."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, lam, states


def dpmpp_2m(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """x' = (sigma'/sigma)·x − alpha'·(e^(−h) − 1)·D, D from this and the last x0  (arXiv:2211.01095,
    algorithm 2).

    The first step is of order 1, and so is one to or from an infinite lambda (clean data, zero SNR), and with
    ``lower_order_final`` the last.
    """
    alpha, sigma = states(grid)
    lams = [lam(a, s) for a, s in zip(alpha, sigma, strict=True)]
    last_x0: Tensor | None = None
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        h = lams[i + 1] - lams[i]
        first_order = (
            last_x0 is None
            or math.isinf(h)
            or math.isinf(lams[i - 1])
            or (lower_order_final and i == len(grid) - 1)
        )
        D = d.x0
        if not first_order:
            r = (lams[i] - lams[i - 1]) / h
            D = (1 + 1 / (2 * r)) * d.x0 - 1 / (2 * r) * last_x0
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * D
        last_x0 = d.x0
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
