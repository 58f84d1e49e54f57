"""Spacings: where a grid of N steps places its timesteps or noise levels.

Spacings in t, for a schedule of T entries and i = 0 … N − 1 (the noisiest first):

    leading          (N − 1 − i)·(T // N) + offset
    trailing         T − i·T/N − 1
    linspace         from T − 1 to 0 in equal steps
    sgm              T − 1 − i·(T − 1)/N, rounded down
    lcm              N of the 50 timesteps k·(T // 50) − 1 that consistency models are distilled at

Spacings in the noise level s = sigma/alpha, from its maximum to its minimum, with u = i/(N − 1):

    karras           s^(1/rho) falls linearly, with rho = 7  (Karras et al. 2022, arXiv:2206.00364, eq. 5)
    exponential      log s falls linearly; `lambda` is another name, as log(alpha/sigma) = −log s
    polyexponential  log s = log min + (1 − u)^rho·(log max − log min), with rho = 1
    ays_sd1          Align Your Steps' table for SD 1, interpolated log-linearly  (arXiv:2404.14507)
    ays_sdxl         the same for SDXL

All spacings in t take the same arguments and return decreasing timesteps, float64, shape (n,):

    T        number of timesteps of the schedule
    n        number of nodes, N or N + 1
    offset   added by the leading spacing
    integer  whether timesteps are rounded to table entries

All spacings in the noise level take these and return decreasing values of log(sigma/alpha), float64, shape
(n,):

    low      log of the smallest level
    high     log of the largest level
    n        number of nodes, N or N + 1
    rho      the exponent; None for the spacing's own
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TimeSpacing = Callable[[int, int, int, bool], Tensor]
LevelSpacing = Callable[[float, float, int, float | None], Tensor]

# noise levels sigma/alpha optimised for ten steps, arXiv:2404.14507
AYS_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
DISTILLED = 50  # timesteps that consistency models are distilled at


def leading_times(T: int, n: int, offset: int, integer: bool) -> Tensor:
    """Return n multiples of T // n, shifted up by `offset`; they are whole numbers in any case."""
    step = T // n
    if T - n * step > T // 10:
        raise ValueError(
            f"steps of {T}//{n} = {step} would leave out the noisiest {T - (n - 1) * step} of {T} timesteps"
        )
    if (n - 1) * step + offset > T - 1:
        raise ValueError(
            f"the first timestep would be {(n - 1) * step + offset}, beyond the schedule's last, {T - 1}"
        )
    return torch.arange(n - 1, -1, -1, dtype=torch.float64, device="cpu") * step + offset


def trailing_times(T: int, n: int, offset: int, integer: bool) -> Tensor:
    """Return n timesteps in equal steps of T/n down from T − 1; `offset` is not used."""
    t = T - torch.arange(n, dtype=torch.float64, device="cpu") * T / n
    return (t.round() if integer else t) - 1


def linspace_times(T: int, n: int, offset: int, integer: bool) -> Tensor:
    """Return n timesteps in equal steps from T − 1 to 0; `offset` is not used."""
    t = torch.linspace(T - 1, 0, n, dtype=torch.float64, device="cpu")
    return t.round() if integer else t


def sgm_times(T: int, n: int, offset: int, integer: bool) -> Tensor:
    """Return n timesteps in equal steps of (T − 1)/n down from T − 1; `offset` is not used."""
    t = T - 1 - torch.arange(n, dtype=torch.float64, device="cpu") * (T - 1) / n
    return t.floor() if integer else t


def lcm_times(T: int, n: int, offset: int, integer: bool) -> Tensor:
    """Return n of the 50 timesteps of distillation, evenly chosen from the noisiest; `offset` is not used."""
    if T < DISTILLED or n > DISTILLED:
        raise ValueError(f"lcm chooses among the {DISTILLED} timesteps of distillation, got {n} of {T}")
    chosen = torch.arange(n, device="cpu") * DISTILLED // n  # counted from the noisiest
    return ((DISTILLED - chosen) * (T // DISTILLED) - 1).double()


def karras_levels(low: float, high: float, n: int, rho: float | None) -> Tensor:
    """Return n levels whose (sigma/alpha)^(1/rho) is linear; rho is 7 by default."""
    rho = 7.0 if rho is None else rho
    a, b = math.exp(high / rho), math.exp(low / rho)
    return (a + _ramp(n) * (b - a)).log() * rho


def exponential_levels(low: float, high: float, n: int, rho: float | None) -> Tensor:
    """Return n levels in equal steps of log(sigma/alpha); `rho` is not used."""
    return high + _ramp(n) * (low - high)


def polyexponential_levels(low: float, high: float, n: int, rho: float | None) -> Tensor:
    """Return n levels whose log(sigma/alpha) falls as (1 − u)^rho; rho is 1 by default."""
    return low + (1 - _ramp(n)) ** (1.0 if rho is None else rho) * (high - low)


def ays_levels(table: tuple[float, ...]) -> LevelSpacing:
    """Return the spacing that interpolates a table of noise levels log-linearly, clamped to [low, high]."""

    def spacing(low: float, high: float, n: int, rho: float | None) -> Tensor:
        logs = torch.tensor(table, dtype=torch.float64, device="cpu").log()
        position = _ramp(n) * (len(logs) - 1)
        index = position.floor().long().clamp(max=len(logs) - 2)
        return (logs[index] + (position - index) * (logs[index + 1] - logs[index])).clamp(low, high)

    return spacing


def _ramp(n: int) -> Tensor:
    """Return u = i/(n − 1), shape (n,)."""
    return torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")


TIME_SPACINGS: dict[str, TimeSpacing] = {
    "leading": leading_times,
    "trailing": trailing_times,
    "linspace": linspace_times,
    "sgm": sgm_times,
    "lcm": lcm_times,
}
LEVEL_SPACINGS: dict[str, LevelSpacing] = {
    "karras": karras_levels,
    "exponential": exponential_levels,
    "polyexponential": polyexponential_levels,
    "lambda": exponential_levels,
    "ays_sd1": ays_levels(AYS_SD1),
    "ays_sdxl": ays_levels(AYS_SDXL),
}
SPACINGS: tuple[str, ...] = (*TIME_SPACINGS, *LEVEL_SPACINGS)
