"""Noise schedules: alpha and sigma of every timestep, and forward noising.

Forward noising mixes clean data x0 and standard normal noise eps (DDPM, Ho et al. 2020, arXiv:2006.11239, eq.
4):

    x_t = alpha_t·x0 + sigma_t·eps,   alpha_t² = alpha_bar_t,   sigma_t² = 1 − alpha_bar_t

where alpha_bar_t = prod_{s <= t} (1 − beta_s) is a table of T entries, t = 0 … T − 1. Between two entries
log(sigma/alpha) is linear in t, which defines alpha and sigma at fractional t and the t of a given noise
level:

    r = log(sigma/alpha),   alpha² = 1/(1 + e^(2r)),   sigma² = 1/(1 + e^(−2r))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.support.config import nearest
from ldm.support.defaults import as_tensor
from ldm.support.text import shown

ScheduleName = Literal["linear", "scaled_linear", "cosine"]
SCHEDULE_NAMES: tuple[ScheduleName, ...] = get_args(ScheduleName)
ROUNDING = 1e-9  # tolerance for log(sigma/alpha) at the ends of the table


def forward_noise(x0: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return x_t = alpha·x0 + sigma·eps (DDPM, eq. 4).

    Args:
        x0: Clean data, shape (B, *S).
        eps: Standard normal noise, shape (B, *S).
        alpha: A number, or a tensor that broadcasts against x0.
        sigma: A number, or a tensor that broadcasts against x0.

    Raises:
        ValueError: If the shapes of x0 and eps differ.
    """
    if x0.shape != eps.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and eps {tuple(eps.shape)} must have the same shape")
    return alpha * x0 + sigma * eps


def alpha_sigma_of_level(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma of noise levels log(sigma/alpha), in their shape; +inf is pure noise."""
    return torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt()


def broadcast(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a () or (B,) tensor to (1 or B, 1, …, 1), in the dtype and on the device of `like` (B, *S)."""
    if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(like))):
        raise ValueError(f"expected shape () or ({len(like)},), got {tuple(value.shape)}")
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving noise schedule, given by its table of alpha_bar.

    Args:
        alphas_cumprod: alpha_bar of each timestep, shape (T,), strictly decreasing, in [0, 1). Stored in
            float64 on the CPU; it is not part of any module, so `.half()` does not round it.

    Raises:
        ValueError: If the table is empty, not one-dimensional, not decreasing or out of range.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        table = as_tensor(self.alphas_cumprod).detach().to("cpu", torch.float64, copy=True)
        if table.ndim != 1 or len(table) < 1:
            raise ValueError(f"alphas_cumprod has shape {tuple(table.shape)}, expected (T,) with T >= 1")
        if not bool(((table >= 0) & (table < 1)).all()):
            raise ValueError(
                f"alphas_cumprod must lie in [0, 1), got values from {float(table.min())} to"
                f" {float(table.max())}"
            )
        if not bool((table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly with t")
        object.__setattr__(self, "alphas_cumprod", table)

    def __len__(self) -> int:
        """Return T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @classmethod
    def make(
        cls,
        name: ScheduleName,
        T: int = 1000,
        *,
        beta_start: float | None = None,
        beta_end: float | None = None,
    ) -> NoiseSchedule:
        """Return the schedule called `name`: linear, scaled_linear or cosine.

        Args:
            name: The name of the constructor.
            T: Number of timesteps. Default: 1000.
            beta_start: First beta, for linear and scaled_linear. Default: that of the constructor.
            beta_end: Last beta, for linear and scaled_linear. Default: that of the constructor.

        Raises:
            ValueError: If there is no schedule of this name, or betas are given for cosine.
        """
        betas = {"beta_start": beta_start, "beta_end": beta_end}
        given = {key: value for key, value in betas.items() if value is not None}
        if name == "linear":
            return cls.linear(T, **given)
        if name == "scaled_linear":
            return cls.scaled_linear(T, **given)
        if name != "cosine":
            raise ValueError(f"unknown schedule {shown(name)}; {nearest(name, SCHEDULE_NAMES)}")
        if given:
            raise ValueError(f"the cosine schedule has no {' or '.join(given)}")
        return cls.cosine(T)

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """Return the schedule of betas, shape (T,), in (0, 1]; only the last may be 1."""
        betas = as_tensor(betas).to("cpu", torch.float64)
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(
                f"betas must lie in (0, 1], got values from {float(betas.min())} to {float(betas.max())}"
            )
        return cls((1 - betas).cumprod(0))

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Return the schedule with equally spaced betas (DDPM, section 4; CompVis calls it `sqrt_linear`)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64, device="cpu"))

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Return the schedule with equally spaced sqrt(beta) (latent diffusion; CompVis says `linear`)."""
        return cls.from_betas(
            torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=torch.float64, device="cpu")
            ** 2
        )

    @classmethod
    def cosine(cls, T: int = 1000, *, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """Return the cosine schedule, alpha_bar(u) ∝ cos²((u + s)/(1 + s)·π/2) with u = t/T.

        Source: Improved DDPM (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17).

        Args:
            T: Number of timesteps. Default: 1000.
            s: Offset that keeps the first betas from being too small. Default: 0.008.
            max_beta: Upper bound of beta. Default: 0.999.
        """
        u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
        bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2  # (T + 1,)
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 − alpha_bar_t/alpha_bar_(t−1), shape (T,), float64."""
        before = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / before

    @property
    def log_ratio(self) -> Tensor:
        """log(sigma/alpha) of every table entry, shape (T,), strictly increasing; +inf where alpha is 0."""
        return 0.5 * (torch.log1p(-self.alphas_cumprod) - torch.log(self.alphas_cumprod))

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at t.

        Args:
            t: Timesteps in [0, T − 1], of any shape. Between table entries log(sigma/alpha) is linear in t.

        Returns:
            alpha and sigma, each with the shape and on the device of t, float64 (float32 on MPS).

        Raises:
            ValueError: If t is outside [0, T − 1], or between the last two entries of a zero-terminal-SNR
                table.
        """
        t = as_tensor(t)
        device = t.device
        t = t.to("cpu", torch.float64)
        last = len(self) - 1
        if not bool(((t >= 0) & (t <= last)).all()):
            raise ValueError(
                f"t must lie in [0, {last}], got values from {float(t.min())} to {float(t.max())}"
            )
        low = t.floor().long()
        fraction = t - low
        bar = self.alphas_cumprod[low]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        if bool((fraction > 0).any()):
            below, above = self.log_ratio[low], self.log_ratio[(low + 1).clamp(max=last)]
            if bool(((fraction > 0) & above.isinf()).any()):
                raise ValueError(
                    f"t lies between {last - 1} and {last}, where this zero-terminal-SNR schedule jumps to"
                    " alpha 0"
                )
            level = torch.where(fraction > 0, below + fraction * (above - below), below)
            between = alpha_sigma_of_level(level)
            alpha = torch.where(fraction > 0, between[0], alpha)
            sigma = torch.where(fraction > 0, between[1], sigma)
        if device.type == "mps":  # has no float64
            alpha, sigma = alpha.float(), sigma.float()
        return alpha.to(device), sigma.to(device)

    def alpha_sigma_like(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at t, () or (B,), as (1 or B, 1, …, 1) tensors beside `like` (B, *S)."""
        alpha, sigma = self.alpha_sigma(t)
        return broadcast(alpha, like), broadcast(sigma, like)

    def network_time(self, t: Tensor) -> Tensor:
        """Return what the network reads as its time at t; t itself for this class."""
        return t

    def time(self, log_ratio: Tensor | float) -> Tensor:
        """Return the fractional t of noise levels log(sigma/alpha); the inverse of `alpha_sigma`.

        Args:
            log_ratio: Levels within the table's range, of any shape.

        Returns:
            t, of the same shape, float64 on the CPU.

        Raises:
            ValueError: If a level is outside the table, or between the last two entries of a
                zero-terminal-SNR table.
        """
        table, level = self.log_ratio, as_tensor(log_ratio).to("cpu", torch.float64)
        low, high = float(table[0]), float(table[-1])
        if not bool(((level >= low - ROUNDING) & (level <= high + ROUNDING)).all()):
            found = f"from {math.exp(float(level.min())):.6g} to {math.exp(float(level.max())):.6g}"
            raise ValueError(
                f"sigma/alpha must lie in the schedule's [{math.exp(low):.6g}, {math.exp(high):.6g}], got"
                f" {found}"
            )
        if len(table) == 1:
            return torch.zeros_like(level)
        level = level.clamp(low, high)
        index = torch.searchsorted(table, level, right=True).clamp(max=len(table) - 1) - 1
        below, above = table[index], table[index + 1]
        if bool((above.isinf() & level.isfinite() & (level > below)).any()):
            raise ValueError(
                "sigma/alpha lies between the last two entries of a zero-terminal-SNR schedule, where t is"
                " not defined"
            )
        fraction = torch.where(
            level == below, 0.0, torch.where(level == above, 1.0, (level - below) / (above - below))
        )
        return index + fraction

    def snr(self, t: Tensor | float) -> Tensor:
        """Return the signal-to-noise ratio alpha²/sigma² at t, in the shape of t, float64."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma) ** 2

    def add_noise(self, x0: Tensor, t: Tensor | float, eps: Tensor) -> Tensor:
        """Return x_t = alpha_t·x0 + sigma_t·eps (DDPM, eq. 4).

        Args:
            x0: Clean data, shape (B, *S).
            t: Timesteps in [0, T − 1], shape () or (B,).
            eps: Standard normal noise, shape (B, *S).

        Raises:
            ValueError: If the shapes differ or t is out of range.
        """
        return forward_noise(x0, eps, *self.alpha_sigma_like(t, x0))

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule with sqrt(alpha_bar) shifted and scaled so that its last entry is 0.

        The first entry is kept (Lin et al. 2023, arXiv:2305.08891, algorithm 1).
        """
        root = self.alphas_cumprod.sqrt()
        if len(root) < 2:
            raise ValueError("a schedule of one timestep cannot keep its first entry and end at 0")
        return NoiseSchedule(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
