"""DPM-Solver++(2S) with ancestral noise: second order, two evaluations a step."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, ancestral, demand, of_ratio, ratio, states, toward, within


def dpmpp_2s_a(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """The step to rho_down with x0 taken at the midpoint in lambda  (arXiv:2211.01095, algorithm 1, r = 1/2),
    then noise rho_up.

    eta in [0, 1], 0 is deterministic. Where the midpoint's level is none that the schedule has, the step is
    of order 1.
    """
    within(eta, 0, 1, "eta")
    draw = demand(noise, "dpmpp_2s_a") if eta > 0 else None
    alpha, sigma = states(grid)
    least = float(grid.schedule.log_ratio[0].exp())
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = ratio(alpha[i], sigma[i]), ratio(alpha[i + 1], sigma[i + 1])
        down, up = ancestral(rho, rho_next, eta)
        x0 = d.x0
        if alpha[i] > 0 and rho * down > least**2 * (1 - 1e-9):
            rho_mid = math.sqrt(rho * down)
            middle = toward(x, d.x0, sigma[i], rho, of_ratio(rho_mid)[0], rho_mid)
            x0 = denoise(middle, grid.time(math.log(rho_mid))).x0
        x = toward(x, x0, sigma[i], rho, alpha[i + 1], down)
        if draw is not None and up > 0:
            x = x + alpha[i + 1] * up * s_noise * draw(i, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
