"""Inversion: from clean data back to the noise that a sampler would make it of."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, OnStep
from ldm.samplers.common import after, states, within

# sigma/alpha to invert to: a rounding of the network is seen so many times as large in the end; Stable
# Diffusion begins at 14.6
NOISIEST = 20.0


def ddim_invert(
    denoise: DenoiseFn, x: Tensor, grid: TimeGrid, *, on_step: OnStep | None = None, iterations: int = 1
) -> Tensor:
    """The state 0 (B, *S) from which ``ddim`` leads to x, the grid's last state  (arXiv:2105.05233, section
    F; fixed point: arXiv:2312.12540).

    Each step solves x_i = a·x_(i+1) + b·eps(x_i, t_i) by iteration from x_(i+1): once is the usual
    approximation, more makes it exact where the iteration contracts. ``on_step`` is called with the index of
    the state reached, N − 1 … 0.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    alpha, sigma = states(grid)
    for i in reversed(range(len(grid))):
        a = alpha[i] / alpha[i + 1]
        b = sigma[i] - a * sigma[i + 1]
        guess = x
        for _ in range(iterations):
            d = denoise(guess, grid.t[i])
            guess = a * x + b * d.eps
        x, stop = after(on_step, i, guess, d)
        if stop:
            break
    return x


def edict(
    denoise: DenoiseFn, x: Tensor, y: Tensor, grid: TimeGrid, *, p: float = 0.93
) -> tuple[Tensor, Tensor]:
    """Two coupled DDIM tracks from state 0 to state N, each (B, *S), which ``edict_invert`` undoes exactly
    (arXiv:2211.12446, eq. 14).

    Start with x = y for a new image, or with both of ``edict_invert``. p in (0, 1] mixes the tracks; 1 leaves
    them apart.
    """
    _check(p)
    alpha, sigma = states(grid)
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
    """The states 0 of both tracks from which ``edict`` leads to x and y, up to rounding (which p < 1
    amplifies by p^(−2N) at most)."""
    _check(p)
    alpha, sigma = states(grid)
    for i in reversed(range(len(grid))):
        a = alpha[i + 1] / alpha[i]
        b = sigma[i + 1] - a * sigma[i]
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        y = (y - b * denoise(x, grid.t[i]).eps) / a
        x = (x - b * denoise(y, grid.t[i]).eps) / a
    return x, y


def _check(p: float) -> None:
    within(p, 1e-6, 1, "p")
