"""RePaint: a sampler that goes back up and comes down again, so that what is made agrees with what is
known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn, OnStep, Sampler
from ldm.samplers.common import demand, states


def repaint(solve: Sampler, *, times: int = 10, jump: int = 10) -> Sampler:
    """``solve`` over stretches of ``jump`` steps, each taken ``times`` times: in between the state is noised
    back to where the stretch began, x ← (alpha/alpha')·x + sqrt(sigma² − (alpha/alpha')²·sigma'²)·z  (Lugmayr
    et al. 2022, algorithm 1 and section 4.2).

    With ``times`` 1 and ``jump`` at least the number of steps it is ``solve`` itself; a multistep method
    starts anew on each stretch. Draws are numbered in the order in which they are made; ``on_step`` gets the
    step's index on the whole grid, as often as the step is taken.
    """
    if times < 1 or jump < 1:
        raise ValueError(f"times and jump must be at least 1, got {times} and {jump}")

    def sampler(
        denoise: DenoiseFn,
        x: Tensor,
        grid: TimeGrid,
        *,
        noise: NoiseFn | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        alpha, sigma = states(grid)
        drawn, stopped = 0, False

        def draw(k: int, like: Tensor) -> Tensor:
            nonlocal drawn
            drawn += 1
            return demand(noise, "repaint")(drawn - 1, like)

        for start in range(0, len(grid), jump):
            end = min(start + jump, len(grid))
            part = replace(
                grid,
                t=grid.t[start:end],
                alpha=grid.alpha[start : end + 1],
                sigma=grid.sigma[start : end + 1],
            )

            def hook(i: int, state: Tensor, d: Denoised, start: int = start) -> Tensor | None:
                nonlocal stopped
                try:
                    return None if on_step is None else on_step(start + i, state, d)
                except StopIteration:
                    stopped = True
                    raise

            for again in range(times):
                x = solve(denoise, x, part, noise=draw, on_step=hook, **options)
                if stopped:
                    return x
                if again < times - 1:
                    a = alpha[start] / alpha[end]
                    x = a * x + math.sqrt(sigma[start] ** 2 - (a * sigma[end]) ** 2) * draw(0, x)
        return x

    return sampler
