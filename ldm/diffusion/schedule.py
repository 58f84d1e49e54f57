"""Noise schedules: the table of alpha-bar, and closed-form forward noising."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """x_t = alpha_t·x0 + sigma_t·eps with alpha_t² = alphas_cumprod[t], sigma_t² = 1 − alpha_t²  (DDPM,
    arXiv:2006.11239, eq. 4).

    ``alphas_cumprod`` (T,) is kept in float64 on the CPU; strictly falling, in [0, 1). No module owns it, so
    no ``.half()`` rounds it.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.alphas_cumprod).detach().to("cpu", torch.float64, copy=True)
        if table.ndim != 1 or len(table) < 1:
            raise ValueError(f"alphas_cumprod has shape {tuple(table.shape)}, expected (T,) with T >= 1")
        if not bool(((table >= 0) & (table < 1)).all()):
            raise ValueError(
                f"alphas_cumprod must lie in [0, 1), got values from {float(table.min())} to"
                f" {float(table.max())}"
            )
        if not bool((table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must fall strictly with t")
        object.__setattr__(self, "alphas_cumprod", table)

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """alphas_cumprod = prod(1 − beta), betas (T,) in (0, 1]; only the last may be 1."""
        betas = torch.as_tensor(betas).to("cpu", torch.float64)
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(
                f"betas must lie in (0, 1], got values from {float(betas.min())} to {float(betas.max())}"
            )
        return cls((1 - betas).cumprod(0))

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas in equal steps (DDPM, section 4); CompVis calls this one ``sqrt_linear``."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Square roots of beta in equal steps: latent diffusion's schedule (CompVis calls it ``linear``)."""
        return cls.from_betas(
            torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=torch.float64) ** 2
        )

    @classmethod
    def cosine(cls, T: int = 1000, *, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """alpha-bar(u) ∝ cos²((u + s)/(1 + s)·π/2), betas clipped at max_beta (Improved DDPM,
        arXiv:2102.09672, eq. 17)."""
        u = torch.arange(T + 1, dtype=torch.float64) / T
        bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2  # (T + 1,)
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 − alphas_cumprod[t]/alphas_cumprod[t−1], (T,) float64."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / before

    @property
    def log_ratio(self) -> Tensor:
        """log(sigma/alpha) of every table entry, (T,) float64; rises strictly; +inf where alpha is 0."""
        return 0.5 * (torch.log1p(-self.alphas_cumprod) - torch.log(self.alphas_cumprod))

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, of t's shape and device, float64; between table entries log(sigma/alpha) is
        linear in t.

        Raises ValueError if t is outside [0, T − 1], or between the last two entries of a zero-terminal-SNR
        table.
        """
        t = torch.as_tensor(t)
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
            table = self.log_ratio
            below, above = table[low], table[(low + 1).clamp(max=last)]
            if bool(((fraction > 0) & above.isinf()).any()):
                raise ValueError(
                    f"t lies between {last - 1} and {last}, where this zero-terminal-SNR schedule jumps to"
                    " alpha 0"
                )
            log_ratio = torch.where(fraction > 0, below + fraction * (above - below), below)
            # alpha² = 1/(1 + e^(2r)), sigma² = 1/(1 + e^(−2r)); table entries are taken as they stand
            alpha = torch.where(fraction > 0, torch.sigmoid(-2 * log_ratio).sqrt(), alpha)
            sigma = torch.where(fraction > 0, torch.sigmoid(2 * log_ratio).sqrt(), sigma)
        if device.type == "mps":  # has no float64
            alpha, sigma = alpha.float(), sigma.float()
        return alpha.to(device), sigma.to(device)

    def snr(self, t: Tensor | float) -> Tensor:
        """Signal-to-noise ratio alpha²/sigma² at t, of t's shape, float64."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma) ** 2

    def add_noise(self, x0: Tensor, t: Tensor | float, eps: Tensor) -> Tensor:
        """x_t = alpha_t·x0 + sigma_t·eps for x0 and eps (B, *S) and t () or (B,)  (DDPM, eq. 4)."""
        if x0.shape != eps.shape:
            raise ValueError(f"x0 {tuple(x0.shape)} and eps {tuple(eps.shape)} must have one shape")
        alpha, sigma = (broadcast(value, x0) for value in self.alpha_sigma(t))
        return alpha * x0 + sigma * eps

    def zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule with sqrt(alpha-bar) shifted and scaled: the first entry kept, the last 0
        (arXiv:2305.08891, algorithm 1)."""
        root = self.alphas_cumprod.sqrt()
        if len(root) < 2:
            raise ValueError("a schedule of one timestep cannot keep its first entry and end at 0")
        return NoiseSchedule(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def broadcast(value: Tensor, like: Tensor) -> Tensor:
    """A () or (B,) tensor as (1 or B, 1, …, 1) beside ``like`` (B, *S), in its dtype and on its device."""
    if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(like))):
        raise ValueError(f"expected shape () or ({len(like)},), got {tuple(value.shape)}")
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))
