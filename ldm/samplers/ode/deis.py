"""DEIS: eps extrapolated as a polynomial in log sigma and integrated exactly, one evaluation a step."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, ratio, states, toward
from ldm.samplers.quadrature import lagrange_weights


def deis(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    order: int = 2,
    lower_order_final: bool = False,
) -> Tensor:
    """y' = y + sum_j w_j·eps_j, w_j the integral over rho of the Lagrange polynomial in log rho
    (arXiv:2204.13902, eq. 14–15).

    order 1, 2 or 3; the first steps have the order that the history allows, with ``lower_order_final`` the
    last as well; a step to clean data or from pure noise is of order 1.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    alpha, sigma = states(grid)
    history: list[tuple[float, Tensor]] = []  # (log rho, eps), the newest first
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = ratio(alpha[i], sigma[i]), ratio(alpha[i + 1], sigma[i + 1])
        if alpha[i] > 0:
            history = [(math.log(rho), d.eps), *history][:order]
        use = history[: len(grid) - i] if lower_order_final else history
        if alpha[i] == 0 or rho_next == 0 or len(use) == 1:
            x = toward(x, d.x0, sigma[i], rho, alpha[i + 1], rho_next)
        else:
            # d rho = rho d log rho
            weights = lagrange_weights([u for u, _ in use], math.log(rho), math.log(rho_next), np.exp)
            x = alpha[i + 1] / alpha[i] * x + alpha[i + 1] * sum(
                w * eps for w, (_, eps) in zip(weights, use, strict=True)
            )
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
