"""DPM-Solver-2 with ancestral noise."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, ancestral, demand, ratio, states, toward, within
from ldm.samplers.ode.dpm2 import midpoint


def dpm2_a(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """``dpm2``'s step to rho_down, then noise rho_up, with rho_down² + rho_up² = rho'²; eta in [0, 1], 0 is
    ``dpm2``.

    The midpoint's level, as that of rho_down itself, must be one that the schedule has: below its least, the
    step is Euler's.
    """
    within(eta, 0, 1, "eta")
    draw = demand(noise, "dpm2_a") if eta > 0 else None
    alpha, sigma = states(grid)
    least = float(grid.schedule.log_ratio[0].exp())
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = ratio(alpha[i], sigma[i]), ratio(alpha[i + 1], sigma[i + 1])
        down, up = ancestral(rho, rho_next, eta)
        if alpha[i] == 0 or rho * down < least**2 * (1 - 1e-9):
            x = toward(x, d.x0, sigma[i], rho, alpha[i + 1], down)
        else:
            x = midpoint(denoise, x, d.eps, grid, alpha[i], rho, alpha[i + 1], down)
        if draw is not None and up > 0:
            x = x + alpha[i + 1] * up * s_noise * draw(i, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
