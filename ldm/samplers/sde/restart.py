"""Restart: Heun's method that noises the state back up (Xu et al. 2023, arXiv:2306.14878, algorithm 1).

Once the grid passes the level `low`, the state at rho is noised up to the level `high` and solved down again,
with y = x/alpha and rho = sigma/alpha:

    y_up = y + sqrt(high² − rho²)·z,   then Heun's steps from high to rho, spaced as `karras` with exponent 7

The added noise contracts the errors that the deterministic solver has accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import (
    alphas_sigmas,
    call_on_step,
    noise_ratio,
    renoise_ratio,
    require_noise,
    state_of_ratio,
    step_const_eps,
    step_const_x0,
)
from ldm.support.text import shown

MAX_HIGH, MAX_REPEATS = 1e4, 1000


class Restart(NamedTuple):
    """One stretch of noise levels that is solved again.

    Attributes:
        low: The restart happens at the first state of the grid with sigma/alpha at or below this. Default:
            0.1.
        high: The sigma/alpha that the state is noised up to. Default: 2.
        times: How often. Default: 1.
        steps: Number of Heun's steps back down. Default: 9.
    """

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
    """Sample with Restart (Xu et al. 2023, algorithm 1), two evaluations per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source, required if there are restarts; draw k is that of the k-th restart. Default:
            None.
        on_step: Called after each step of the grid, not of the restarts; see
            `ldm.diffusion.interfaces.OnStep`. Default: None.
        restarts: The restarts, as `Restart` or (low, high, times, steps). Default: one `Restart()`.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If a restart's numbers are out of range, or noise is missing.
    """
    given = restarts if isinstance(restarts, list | tuple) else [restarts]
    pending = sorted((_checked(item) for item in given), reverse=True)
    draw = require_noise(noise, "restart") if pending else None
    states = list(zip(*alphas_sigmas(grid), strict=True))
    drawn = 0
    for i in range(len(grid)):
        t_next = grid.time_of_state(i + 1) if states[i + 1][1] > 0 else None
        x, d = _heun_step(denoise, x, grid.time_of_state(i), t_next, states[i], states[i + 1])
        rho = noise_ratio(*states[i + 1])
        while draw is not None and pending and 0 < rho <= pending[0].low:
            item = pending.pop(0)
            for _ in range(item.times):
                x = renoise_ratio(x, draw(drawn, x), states[i + 1][0], rho, item.high)
                drawn += 1
                x = _solve_down(denoise, x, grid, item.high, rho, item.steps)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x


def _checked(item: object) -> Restart:
    """Return a restart; ValueError for anything else, or numbers out of range."""
    match item:
        case (float() | int() as low, float() | int() as high, int() as times, int() as steps):
            if 0 < low < high <= MAX_HIGH and 0 <= times <= MAX_REPEATS and 1 <= steps <= MAX_REPEATS:
                return Restart(low, high, times, steps)
    raise ValueError(
        f"restarts: expected (low, high, times, steps) with 0 < low < high <= {MAX_HIGH:g}, times from 0 to"
        f" {MAX_REPEATS} and steps from 1 to {MAX_REPEATS}, got {shown(item)}"
    )


def _solve_down(denoise: DenoiseFn, x: Tensor, grid: TimeGrid, high: float, low: float, steps: int) -> Tensor:
    """Return the state (B, *S) after Heun's steps from the noise level `high` to `low`."""
    a, b = high ** (1 / 7), low ** (1 / 7)
    levels = [high, *((a + k / steps * (b - a)) ** 7 for k in range(1, steps)), low]
    for rho, rho_next in zip(levels[:-1], levels[1:], strict=True):
        times = grid.time(math.log(rho)), grid.time(math.log(rho_next))
        x, _ = _heun_step(denoise, x, *times, state_of_ratio(rho), state_of_ratio(rho_next))
    return x


def _heun_step(
    denoise: DenoiseFn,
    x: Tensor,
    t: Tensor,
    t_next: Tensor | None,
    state: tuple[float, float],
    state_next: tuple[float, float],
) -> tuple[Tensor, Denoised]:
    """Return the state after one of Heun's steps, and the prediction at its start.

    Args:
        denoise: The denoiser.
        x: The state, shape (B, *S).
        t: Its timestep.
        t_next: The timestep at the end of the step; None makes it Euler's step, as does a step from pure
            noise.
        state: alpha and sigma of the state.
        state_next: alpha and sigma of the next state.
    """
    (alpha, sigma), (alpha_next, _) = state, state_next
    rho, rho_next = noise_ratio(*state), noise_ratio(*state_next)
    d = denoise(x, t)
    end = step_const_x0(x, d.x0, sigma, rho, alpha_next, rho_next)
    if t_next is not None and alpha > 0:
        eps = (d.eps + denoise(end, t_next).eps) / 2
        end = step_const_eps(x, eps, alpha, rho, alpha_next, rho_next)
    return end, d
