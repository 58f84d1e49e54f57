"""What every sampler needs: the coefficients as numbers, the first-order step, the step hook, the demand for
noise."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, NoiseFn, OnStep


def states(grid: TimeGrid) -> tuple[list[float], list[float]]:
    """alpha and sigma of the N + 1 states as Python floats: they multiply tensors of any dtype, at full
    precision themselves."""
    return grid.alpha.tolist(), grid.sigma.tolist()


def ratio(alpha: float, sigma: float) -> float:
    """rho = sigma/alpha, the noise level of x/alpha; inf at pure noise."""
    return sigma / alpha if alpha > 0 else math.inf


def lam(alpha: float, sigma: float) -> float:
    """log(alpha/sigma), +inf at clean data and −inf at pure noise."""
    if sigma == 0:
        return math.inf
    return math.log(alpha / sigma) if alpha > 0 else -math.inf


def of_ratio(rho: float) -> tuple[float, float]:
    """(alpha, sigma) of a noise level rho = sigma/alpha."""
    alpha = 1 / math.sqrt(1 + rho**2)
    return alpha, rho * alpha


def toward(x: Tensor, x0: Tensor, sigma: float, rho: float, alpha_next: float, rho_next: float) -> Tensor:
    """The exact step for a constant x0: y' = (rho'/rho)·y + (1 − rho'/rho)·x0 with y = x/alpha, times alpha'.

    In half log-SNR, with h = log(rho/rho'): x' = (sigma'/sigma)·x − alpha'·(e^(−h) − 1)·x0
    (arXiv:2211.01095, eq. 12). rho may be inf.
    """
    return alpha_next * (rho_next / sigma) * x + alpha_next * (1 - rho_next / rho) * x0


def along(x: Tensor, eps: Tensor, alpha: float, rho: float, alpha_next: float, rho_next: float) -> Tensor:
    """The exact step for a constant eps: y' = y + (rho' − rho)·eps with y = x/alpha, times alpha'
    (arXiv:2206.00364, eq. 3)."""
    return alpha_next / alpha * x + alpha_next * (rho_next - rho) * eps


def ancestral(rho: float, rho_next: float, eta: float) -> tuple[float, float]:
    """(rho_down, rho_up), rho_down² + rho_up² = rho'²: step down to the first, then add noise of the second;
    eta 1 is the posterior's."""
    up = min(rho_next, eta * rho_next * math.sqrt(1 - (rho_next / rho) ** 2))
    return math.sqrt(rho_next**2 - up**2), up


def time_of(grid: TimeGrid, i: int) -> Tensor:
    """t of state i (0 … N), where a last state with noise is looked up in the table."""
    return grid.t[i] if i < len(grid) else grid.time(grid.ratio[i].log())


def after(on_step: OnStep | None, i: int, x: Tensor, d: Denoised) -> tuple[Tensor, bool]:
    """The state after the caller's hook, and whether the hook ended the run."""
    if on_step is None:
        return x, False
    try:
        changed = on_step(i, x, d)
    except StopIteration:
        return x, True
    return (x if changed is None else changed), False


def demand(noise: NoiseFn | None, sampler: str) -> NoiseFn:
    """The noise, or ValueError if there is none."""
    if noise is None:
        raise ValueError(
            f"{sampler} draws noise at its steps: give noise, e.g. ldm.diffusion.noise.keyed_noise(seeds)"
        )
    return noise


def choose(value: str, choices: tuple[str, ...], what: str) -> None:
    """ValueError if ``value`` is none of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choices: {', '.join(choices)}")


def within(value: float, low: float, high: float, what: str) -> None:
    """ValueError if ``value`` is outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{what} must lie in [{low}, {high}], got {value}")
