"""LMS: Adams–Bashforth in rho on steps of any length, one evaluation per step.

With y = x/alpha, rho = sigma/alpha and dy/d rho = eps, the last p estimates of eps are interpolated by a
polynomial in rho, which is integrated exactly:

    y' = y + sum_j W_j·eps_j,   W_j = integral from rho to rho' of l_j(u) du

l_j are the Lagrange polynomials of the last p values of rho (Hairer, Nørsett, Wanner, "Solving Ordinary
Differential Equations I", III.5). The first steps have the order that the history allows; a step from pure
noise is of order 1.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, noise_ratio, step_const_x0
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
    """Sample with a linear multistep method in sigma/alpha, one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: Not used. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        order: Number p of evaluations that a step uses: 1, 2, 3 or 4. Default: 4.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If the order is not 1, 2, 3 or 4.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, got {order}")
    alpha, sigma = alphas_sigmas(grid)
    history: list[tuple[float, Tensor]] = []  # (rho, eps), newest first
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = noise_ratio(alpha[i], sigma[i]), noise_ratio(alpha[i + 1], sigma[i + 1])
        if alpha[i] == 0:
            x = step_const_x0(x, d.x0, sigma[i], rho, alpha[i + 1], rho_next)
        else:
            history = [(rho, d.eps), *history][:order]
            weights = lagrange_weights([node for node, _ in history], rho, rho_next)
            integral = sum(w * eps for w, (_, eps) in zip(weights, history, strict=True))
            x = alpha[i + 1] / alpha[i] * x + alpha[i + 1] * integral
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x
