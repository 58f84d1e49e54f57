"""Inversion: from clean data to the noise from which a sampler would produce it.

DDIM's step is linear in x and eps: x' = a·x + b·eps(x, t) with a = alpha'/alpha, b = sigma' − a·sigma. Its
inverse

    x = (x' − b·eps(x, t))/a

is implicit. `ddim_invert` solves it by fixed-point iteration; EDICT (Wallace et al. 2022, arXiv:2211.12446)
couples two copies of the state, each step of which uses the other's eps, and is inverted exactly.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, check_range

# sigma/alpha up to which inversion goes: beyond it x/alpha holds the data only as a difference of large
# numbers, so rounding errors of the network grow by this factor. Stable Diffusion's largest is 14.6.
NOISIEST = 20.0


def ddim_invert(
    denoise: DenoiseFn, x: Tensor, grid: TimeGrid, *, on_step: OnStep | None = None, iterations: int = 1
) -> Tensor:
    """Return the state 0 from which `ddim` leads to x, shape (B, *S).

    Sources: Dhariwal and Nichol 2021, arXiv:2105.05233, section F; fixed point: Pan et al. 2023,
    arXiv:2312.12540.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The grid's last state, shape (B, *S).
        grid: The time grid of N steps, of `ddim`.
        on_step: Called after each step with the index of the state reached, N − 1 … 0. Default: None.
        iterations: Evaluations per step, at least 1. One is the usual approximation eps(x) ≈ eps(x'); more
            converge to the exact inverse where the iteration contracts. Default: 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    alpha, sigma = alphas_sigmas(grid)
    for i in reversed(range(len(grid))):
        a = alpha[i] / alpha[i + 1]
        b = sigma[i] - a * sigma[i + 1]
        guess = x
        for _ in range(iterations):
            d = denoise(guess, grid.t[i])
            guess = a * x + b * d.eps
        x, stop = call_on_step(on_step, i, guess, d)
        if stop:
            break
    return x


def edict(
    denoise: DenoiseFn, x: Tensor, y: Tensor, grid: TimeGrid, *, p: float = 0.93
) -> tuple[Tensor, Tensor]:
    """Return the last states of two coupled DDIM trajectories, which `edict_invert` inverts exactly.

    Source: EDICT (Wallace et al. 2022, arXiv:2211.12446, eq. 14).

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: State 0 of the first trajectory, shape (B, *S).
        y: State 0 of the second; equal to x for a new image.
        grid: The time grid of N steps.
        p: Mixing weight in (0, 1]; 1 leaves the trajectories unmixed. Default: 0.93.

    Returns:
        The last states of both trajectories, each (B, *S).
    """
    _check_mixing(p)
    alpha, sigma = alphas_sigmas(grid)
    for i, t in enumerate(grid.t):
        a = alpha[i + 1] / alpha[i]
        b = sigma[i + 1] - a * sigma[i]
        x = a * x + b * denoise(y, t).eps
        y = a * y + b * denoise(x, t).eps
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
    return x, y


def edict_invert(
    denoise: DenoiseFn, x: Tensor, y: Tensor, grid: TimeGrid, *, p: float = 0.93
) -> tuple[Tensor, Tensor]:
    """Return the states 0 of both trajectories from which `edict` leads to x and y, up to rounding.

    With p < 1 rounding errors grow by at most p^(−2N).

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The last state of the first trajectory, shape (B, *S).
        y: The last state of the second.
        grid: The time grid of N steps, of `edict`.
        p: Mixing weight of `edict`. Default: 0.93.

    Returns:
        The states 0 of both trajectories, each (B, *S).
    """
    _check_mixing(p)
    alpha, sigma = alphas_sigmas(grid)
    for i in reversed(range(len(grid))):
        a = alpha[i + 1] / alpha[i]
        b = sigma[i + 1] - a * sigma[i]
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        y = (y - b * denoise(x, grid.t[i]).eps) / a
        x = (x - b * denoise(y, grid.t[i]).eps) / a
    return x, y


def _check_mixing(p: float) -> None:
    check_range(p, 1e-6, 1, "p")
