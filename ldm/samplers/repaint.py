"""RePaint: a sampler that repeatedly goes back up in noise, so that generated and known regions harmonise.

The grid is divided into stretches of `jump` steps. Each is solved `times` times, and between two passes the
state is noised from the end of the stretch (alpha', sigma') back to its start (alpha, sigma):

    x ← (alpha/alpha')·x + sqrt(sigma² − (alpha/alpha')²·sigma'²)·z

Source: Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1 and section 4.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn, OnStep, Sampler
from ldm.samplers.common import alphas_sigmas, renoise, require_noise


def repaint(solve: Sampler, *, times: int = 10, jump: int = 10) -> Sampler:
    """Return a sampler that solves each stretch of the grid several times (Lugmayr et al. 2022, algorithm 1).

    The draws of `noise` are numbered in the order in which they are made. `on_step` gets the step's index on
    the whole grid, each time the step is taken. A multistep method starts each stretch without a history.

    Args:
        solve: The sampler that solves a stretch.
        times: How often each stretch is solved, at least 1. Default: 10.
        jump: Number of steps of a stretch, at least 1. With `times` 1 and `jump` at least N this is `solve`.
            Default: 10.

    Returns:
        The sampler; it passes further keyword arguments to `solve`.
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
        **options: Any,  # those of `solve`
    ) -> Tensor:
        alpha, sigma = alphas_sigmas(grid)
        drawn, stopped = 0, False

        def draw(k: int, like: Tensor) -> Tensor:
            nonlocal drawn
            drawn += 1
            return require_noise(noise, "repaint")(drawn - 1, like)

        for start in range(0, len(grid), jump):
            end = min(start + jump, len(grid))

            def hook(i: int, state: Tensor, d: Denoised, start: int = start) -> Tensor | None:
                nonlocal stopped
                try:
                    return None if on_step is None else on_step(start + i, state, d)
                except StopIteration:
                    stopped = True
                    raise

            for k in range(times):
                if k > 0:
                    x = renoise(x, draw(0, x), alpha[end], sigma[end], alpha[start], sigma[start])
                x = solve(denoise, x, grid.part(start, end), noise=draw, on_step=hook, **options)
                if stopped:
                    return x
        return x

    return sampler
