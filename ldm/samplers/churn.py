"""Karras et al.'s churn: a little noise added before a step of an ODE solver."""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import NoiseFn
from ldm.samplers.common import demand, of_ratio, ratio


class Churn:
    """rho_hat = rho·(1 + gamma), gamma = min(s_churn/N, sqrt(2) − 1) for rho in [s_min, s_max]
    (arXiv:2206.00364, algorithm 2).

    A level above the schedule's largest is lowered to it, as the network knows none above.
    """

    def __init__(
        self, s_churn: float, s_min: float, s_max: float, s_noise: float, noise: NoiseFn | None, sampler: str
    ) -> None:
        if s_churn < 0 or s_noise < 0:
            raise ValueError(f"s_churn and s_noise must not be negative, got {s_churn} and {s_noise}")
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise
        self.noise = demand(noise, f"{sampler} with s_churn > 0") if s_churn > 0 else None

    def raised(
        self, x: Tensor, i: int, grid: TimeGrid, alpha: float, sigma: float, t: Tensor
    ) -> tuple[Tensor, Tensor, float, float, float]:
        """(x, t, alpha, sigma, rho) at the raised noise level; as they were where no churn applies."""
        rho = ratio(alpha, sigma)
        gamma = min(self.s_churn / len(grid), math.sqrt(2) - 1) if self.s_min <= rho <= self.s_max else 0.0
        raised = min(rho * (1 + gamma), math.exp(float(grid.schedule.log_ratio[-1])))
        if self.noise is None or gamma == 0 or raised <= rho:
            return x, t, alpha, sigma, rho
        alpha_hat, sigma_hat = of_ratio(raised)
        x = alpha_hat * (x / alpha + self.s_noise * math.sqrt(raised**2 - rho**2) * self.noise(i, x))
        return x, grid.time(math.log(raised)), alpha_hat, sigma_hat, raised
