"""DEIS: eps is a polynomial in log rho, integrated exactly (Zhang and Chen 2023, arXiv:2204.13902).

With y = x/alpha, rho = sigma/alpha and dy/d rho = eps, the last p estimates of eps are interpolated in
log rho:

    y' = y + sum_j W_j·eps_j,   W_j = integral from log rho to log rho' of e^u·l_j(u) du     (d rho = e^u du)

l_j are the Lagrange polynomials of the last p values of log rho. The first steps have the order that the
history allows; a step to clean data or from pure noise is of order 1.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, noise_ratio, step_const_x0
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
    """Sample with DEIS (Zhang and Chen 2023, eq. 14–15), one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: Not used. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        order: Number p of evaluations that a step uses: 1, 2 or 3. Default: 2.
        lower_order_final: Whether the order is at most the number of steps left. Default: False.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If the order is not 1, 2 or 3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    alpha, sigma = alphas_sigmas(grid)
    history: list[tuple[float, Tensor]] = []  # (log rho, eps), newest first
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = noise_ratio(alpha[i], sigma[i]), noise_ratio(alpha[i + 1], sigma[i + 1])
        if alpha[i] > 0:
            history = [(math.log(rho), d.eps), *history][:order]
        used = history[: len(grid) - i] if lower_order_final else history
        if alpha[i] == 0 or rho_next == 0 or len(used) == 1:
            x = step_const_x0(x, d.x0, sigma[i], rho, alpha[i + 1], rho_next)
        else:
            weights = lagrange_weights([u for u, _ in used], math.log(rho), math.log(rho_next), np.exp)
            integral = sum(w * eps for w, (_, eps) in zip(weights, used, strict=True))
            x = alpha[i + 1] / alpha[i] * x + alpha[i + 1] * integral
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
