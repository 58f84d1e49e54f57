"""LMS: a linear multistep method in sigma, one evaluation a step."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, ratio, states, toward
from ldm.samplers.quadrature import lagrange_weights


def lms(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    order: int = 4,
) -> Tensor:
    """y' = y + sum_j w_j·eps_j, w_j the integral from rho to rho' of the Lagrange polynomial through the last
    ``order`` eps.

    Adams–Bashforth on steps of any length (Hairer, Nørsett, Wanner, "Solving ODEs I", III.5); the first steps
    have the order that the history allows.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, got {order}")
    alpha, sigma = states(grid)
    history: list[tuple[float, Tensor]] = []  # (rho, eps), the newest first
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = ratio(alpha[i], sigma[i]), ratio(alpha[i + 1], sigma[i + 1])
        if alpha[i] == 0:
            x = toward(x, d.x0, sigma[i], rho, alpha[i + 1], rho_next)
        else:
            history = [(rho, d.eps), *history][:order]
            weights = lagrange_weights([node for node, _ in history], rho, rho_next)
            slope = sum(w * eps for w, (_, eps) in zip(weights, history, strict=True))
            x = alpha[i + 1] / alpha[i] * x + alpha[i + 1] * slope
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
