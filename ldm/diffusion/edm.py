"""The schedule of EDM (Karras et al. 2022, arXiv:2206.00364, table 1) in the units of this library.

EDM noises data y of standard deviation sigma_data as y + s·n and denoises with

    D = c_skip·(y + s·n) + c_out·F(c_in·(y + s·n), c_noise),   c_noise = ln(s)/4

With x0 = y/sigma_data and sigma/alpha = s/sigma_data, the input c_in·(y + s·n) is x_t, and D/sigma_data is
alpha·x_t + sigma·F. So F is −v: but for the sign, and for what it reads as its time, a network of EDM is one
that predicts v on a variance-preserving schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule, alpha_sigma_of_level


@dataclass(frozen=True, eq=False)
class EDMSchedule(NoiseSchedule):
    """A schedule whose log(sigma/alpha) is linear in t, and whose network reads ln(s)/4.

    Args:
        sigma_data: Standard deviation of the data that the noise levels s are relative to.
    """

    sigma_data: float = 0.5

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, *, sigma_data: float, T: int = 1000) -> EDMSchedule:
        """Return the schedule of T noise levels s from ``sigma_min`` to ``sigma_max``.

        Raises:
            ValueError: Unless 0 < sigma_min < sigma_max, sigma_data > 0 and T >= 2, all finite.
        """
        numbers = (sigma_min, sigma_max, sigma_data)
        if not (all(map(math.isfinite, numbers)) and 0 < sigma_min < sigma_max and sigma_data > 0 and T >= 2):
            raise ValueError(
                "expected 0 < sigma_min < sigma_max, sigma_data > 0 and at least 2 timesteps, got"
                f" {sigma_min}, {sigma_max}, {sigma_data} and {T}"
            )
        low, high = math.log(sigma_min / sigma_data), math.log(sigma_max / sigma_data)
        alpha, _ = alpha_sigma_of_level(torch.linspace(low, high, T, dtype=torch.float64, device="cpu"))
        return cls(alpha**2, sigma_data)

    def network_time(self, t: Tensor) -> Tensor:
        """Return c_noise = ln(s)/4 at t, which the network reads as its time."""
        low, high = float(self.log_ratio[0]), float(self.log_ratio[-1])
        return (t * ((high - low) / (len(self) - 1)) + (low + math.log(self.sigma_data))) / 4
