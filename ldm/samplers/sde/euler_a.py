"""Euler ancestral: an Euler step below the next level, then noise up to it."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, ancestral, demand, ratio, states, toward, within


def euler_a(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """y' = y + (rho_down − rho)·(y − x0)/rho + rho_up·z with y = x/alpha, rho = sigma/alpha; eta in [0, 1], 0
    is Euler.

    eta 1 has the variance of DDPM's posterior; the step is DDIM's with noise in another parameterisation
    (arXiv:2010.02502, eq. 12).
    """
    within(eta, 0, 1, "eta")
    draw = demand(noise, "euler_a") if eta > 0 else None
    alpha, sigma = states(grid)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = ratio(alpha[i], sigma[i]), ratio(alpha[i + 1], sigma[i + 1])
        down, up = ancestral(rho, rho_next, eta)
        x = toward(x, d.x0, sigma[i], rho, alpha[i + 1], down)
        if draw is not None and up > 0:
            x = x + alpha[i + 1] * up * s_noise * draw(i, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
