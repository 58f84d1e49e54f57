"""Show what a sampler will do on a grid: the timesteps of its evaluations and the states of the grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.samplers import get_sampler
from ldm.support.defaults import as_tensor

ADAPTIVE = ("dpm_adaptive",)  # samplers whose number of evaluations depends on the network


def evaluations(grid: TimeGrid, sampler: str, **options: Any) -> int | None:
    """Return how often a sampler evaluates the denoiser on a grid; None if that depends on the network."""
    if sampler in ADAPTIVE:
        return None
    return len(visits(grid, sampler, **options))


def visits(grid: TimeGrid, sampler: str, **options: Any) -> list[float]:
    """Return the timestep of every evaluation, in order, found by running the sampler on zeros.

    Args:
        grid: The grid.
        sampler: Name of the sampler.
        **options: Options of the sampler.
    """
    times: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        times.append(float(as_tensor(t).reshape(-1)[0]))
        return Denoised(x * 0, x, x * 0)

    get_sampler(sampler)(
        denoise,
        torch.zeros(1, 1, device="cpu", dtype=torch.float32),
        grid,
        noise=lambda k, like: torch.zeros_like(like),
        **options,
    )
    return times


def describe_grid(grid: TimeGrid, sampler: str, **options: Any) -> str:
    """Return a table of a grid's states: step, t, alpha-bar, sigma, sigma/alpha, lambda.

    The first line states the sampler, its options and its number of evaluations.

    Args:
        grid: The grid.
        sampler: Name of the sampler.
        **options: Options of the sampler.
    """
    count = evaluations(grid, sampler, **options)
    cost = (
        "evaluations: as its error tolerance requires"
        if count is None
        else f"{count} evaluation{'s' * (count != 1)}"
    )
    chosen = "".join(f", {name} {value}" for name, value in options.items())
    lines = [f"{sampler}{chosen}: {len(grid)} step{'s' * (len(grid) != 1)}, {cost}"]
    lines.append(f"{'step':>4} {'t':>9} {'alpha-bar':>10} {'sigma':>8} {'sigma/alpha':>11} {'lambda':>9}")
    times = [f"{t:9.3f}".rstrip("0").rstrip(".") for t in grid.t.tolist()] + ["end"]
    states = torch.stack([grid.alpha**2, grid.sigma, grid.ratio, grid.lam], dim=1).tolist()
    for i, (t, (bar, sigma, rho, lam)) in enumerate(zip(times, states, strict=True)):
        lines.append(f"{i:>4} {t:>9} {bar:>10.6f} {sigma:>8.5f} {rho:>11.5f} {lam:>9.4f}")
    return "\n".join(lines)
