"""Churn: noise added before each step of an ODE solver (Karras et al. 2022, arXiv:2206.00364, algorithm 2).

    rho_hat = rho·(1 + gamma),   gamma = min(s_churn/N, sqrt(2) − 1) if s_min <= rho <= s_max else 0
    y_hat = y + s_noise·sqrt(rho_hat² − rho²)·z

with y = x/alpha and rho = sigma/alpha. The step then leads from rho_hat to rho'. A level above the schedule's
largest is lowered to it, as the network was not trained above it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import NoiseFn
from ldm.samplers.common import noise_ratio, renoise_ratio, require_noise, state_of_ratio


class ChurnedState(NamedTuple):
    """The state that a step starts from: x (B, *S), its t, alpha, sigma and rho = sigma/alpha."""

    x: Tensor
    t: Tensor
    alpha: float
    sigma: float
    rho: float


class Churn:
    """The churn of one run of a sampler.

    Args:
        s_churn: Amount of noise added over the whole run, at least 0; 0 adds none.
        s_min: Smallest sigma/alpha at which noise is added.
        s_max: Largest sigma/alpha at which noise is added.
        s_noise: Standard deviation of the noise, at least 0.
        noise: The noise source, required if s_churn > 0.
        sampler: Name of the sampler, for error messages.

    Raises:
        ValueError: If s_churn or s_noise is negative, or the noise is missing.
    """

    def __init__(
        self, s_churn: float, s_min: float, s_max: float, s_noise: float, noise: NoiseFn | None, sampler: str
    ) -> None:
        if s_churn < 0 or s_noise < 0:
            raise ValueError(f"s_churn and s_noise must not be negative, got {s_churn} and {s_noise}")
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise
        self.noise = require_noise(noise, f"{sampler} with s_churn > 0") if s_churn > 0 else None

    def __call__(self, x: Tensor, i: int, grid: TimeGrid) -> ChurnedState:
        """Return state i of the grid, x (B, *S), at the raised noise level; unchanged if no churn applies."""
        alpha, sigma = grid.alpha_sigma(i)
        rho = noise_ratio(alpha, sigma)
        gamma = min(self.s_churn / len(grid), math.sqrt(2) - 1) if self.s_min <= rho <= self.s_max else 0.0
        rho_hat = min(rho * (1 + gamma), math.exp(float(grid.schedule.log_ratio[-1])))
        if self.noise is None or gamma == 0 or rho_hat <= rho:
            return ChurnedState(x, grid.time_of_state(i), alpha, sigma, rho)
        x = renoise_ratio(x, self.noise(i, x), alpha, rho, rho_hat, self.s_noise)
        return ChurnedState(x, grid.time(math.log(rho_hat)), *state_of_ratio(rho_hat), rho_hat)
