"""Restart: Heun's method, which goes back up over a stretch of noise levels and comes down again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, along, demand, of_ratio, ratio, states, time_of, toward


class Restart(NamedTuple):
    """Go back from the first state of the grid at or below ``low`` to ``high`` (sigma/alpha), ``times``
    times, and down in ``steps`` steps."""

    low: float = 0.1
    high: float = 2.0
    times: int = 1
    steps: int = 9


def restart(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    restarts: Sequence[Restart | tuple[float, float, int, int]] = (Restart(),),
) -> Tensor:
    """Heun's steps; where the grid passes ``low``: y ← y + sqrt(high² − rho²)·z, then Heun again
    (arXiv:2306.14878, algorithm 1).

    The steps of a restart are spaced as Karras et al. do (rho 7). Draws are numbered in the order of the
    restarts.
    """
    pending = sorted((Restart(*item) for item in restarts), reverse=True)
    for item in pending:
        if not 0 < item.low < item.high or item.times < 0 or item.steps < 1:
            raise ValueError(f"a restart needs 0 < low < high, times >= 0 and steps >= 1, got {item}")
    draw = demand(noise, "restart") if pending else None
    alpha, sigma = states(grid)
    rhos = [ratio(a, s) for a, s in zip(alpha, sigma, strict=True)]
    drawn = 0
    for i in range(len(grid)):
        end_time = time_of(grid, i + 1) if sigma[i + 1] > 0 else None
        x, d = _heun(
            denoise, x, time_of(grid, i), end_time, (alpha[i], sigma[i]), (alpha[i + 1], sigma[i + 1])
        )
        while draw is not None and pending and 0 < rhos[i + 1] <= pending[0].low:
            item = pending.pop(0)
            for _ in range(item.times):
                high, _ = of_ratio(item.high)
                x = high * (x / alpha[i + 1] + math.sqrt(item.high**2 - rhos[i + 1] ** 2) * draw(drawn, x))
                drawn += 1
                x = _down(denoise, x, grid, item.high, rhos[i + 1], item.steps)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x


def _down(denoise: DenoiseFn, x: Tensor, grid: TimeGrid, high: float, low: float, steps: int) -> Tensor:
    """Heun's steps from noise level high to low."""
    a, b = high ** (1 / 7), low ** (1 / 7)
    levels = [high, *((a + k / steps * (b - a)) ** 7 for k in range(1, steps)), low]
    for rho, rho_next in zip(levels[:-1], levels[1:], strict=True):
        times = grid.time(math.log(rho)), grid.time(math.log(rho_next))
        x, _ = _heun(denoise, x, *times, of_ratio(rho), of_ratio(rho_next))
    return x


def _heun(
    denoise: DenoiseFn,
    x: Tensor,
    t: Tensor,
    t_next: Tensor | None,
    start: tuple[float, float],
    end: tuple[float, float],
) -> tuple[Tensor, Denoised]:
    """One of Heun's steps between two (alpha, sigma); Euler's without a time for the end, or from pure
    noise."""
    rho, rho_next = ratio(*start), ratio(*end)
    d = denoise(x, t)
    stop = toward(x, d.x0, start[1], rho, end[0], rho_next)
    if t_next is not None and start[0] > 0:
        stop = along(x, (d.eps + denoise(stop, t_next).eps) / 2, start[0], rho, end[0], rho_next)
    return stop, d
