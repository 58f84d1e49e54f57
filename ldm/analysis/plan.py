"""What a sampler will do on a grid, told beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.samplers import get_sampler

ADAPTIVE = ("dpm_adaptive",)  # evaluations depend on the network


def evaluations(grid: TimeGrid, sampler: str, **options: Any) -> int | None:
    """How often the sampler will call the denoiser on the grid, counted on a stand-in; None where that
    depends on the network."""
    if sampler in ADAPTIVE:
        return None
    return len(visits(grid, sampler, **options))


def visits(grid: TimeGrid, sampler: str, **options: Any) -> list[float]:
    """The t of every evaluation, in order, on a stand-in network that says 0."""
    seen: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        seen.append(float(torch.as_tensor(t).reshape(-1)[0]))
        return Denoised(x * 0, x, x * 0)

    get_sampler(sampler)(
        denoise, torch.zeros(1, 1), grid, noise=lambda k, like: torch.zeros_like(like), **options
    )
    return seen


def describe_grid(grid: TimeGrid, sampler: str, **options: Any) -> str:
    """A table of the grid's states: step, t, alpha-bar, sigma, sigma/alpha, lambda; above it the sampler, its
    options and its evaluations."""
    count = evaluations(grid, sampler, **options)
    told = (
        "evaluations: as its error tolerance asks"
        if count is None
        else f"{count} evaluation{'s' * (count != 1)}"
    )
    chosen = "".join(f", {name} {value}" for name, value in options.items())
    lines = [f"{sampler}{chosen}: {len(grid)} step{'s' * (len(grid) != 1)}, {told}"]
    lines.append(f"{'step':>4} {'t':>9} {'alpha-bar':>10} {'sigma':>8} {'sigma/alpha':>11} {'lambda':>9}")
    times = [f"{t:9.3f}".rstrip("0").rstrip(".") for t in grid.t.tolist()] + ["end"]
    states = torch.stack([grid.alpha**2, grid.sigma, grid.ratio, grid.lam], dim=1).tolist()
    for i, (t, (bar, sigma, rho, lam)) in enumerate(zip(times, states, strict=True)):
        lines.append(f"{i:>4} {t:>9} {bar:>10.6f} {sigma:>8.5f} {rho:>11.5f} {lam:>9.4f}")
    return "\n".join(lines)
