"""Timesteps, and other numbers, as vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(t: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """[cos, sin] of t · max_period^(−i/half), i = 0 … half − 1, in float32 (Ho et al. 2020; half = dim // 2).

    t (...,) in timesteps, fractional allowed; returns (..., dim).
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device)
    )
    angles = t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_sinusoid(scale: Tensor, dim: int = 256) -> Tensor:
    """The guidance scale as latent consistency models read it (Luo et al. 2023, section 4.3), in float32;
    scale (B,) → (B, dim).

    [sin, cos], the other way round from timesteps, of 1000 · (scale − 1) · 10000^(−i/(half − 1)). The scale
    counts as everywhere here: 1 is no guidance, and the paper's w is one less.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10_000.0) / (half - 1) * torch.arange(half, dtype=torch.float32, device=scale.device)
    )
    angles = 1000.0 * (scale.float()[..., None] - 1.0) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def vector_condition(pooled: Tensor, numbers: Tensor, dim: int = 256) -> Tensor:
    """SDXL's vector condition (Podell et al. 2023, section 2.2): the pooled text (B, E), then each number's
    sinusoid → (B, E + K·dim).

    numbers (B, K): for the base model original height and width, crop top and left, target height and width,
    in pixels; for the refiner original height and width, crop top and left, and the aesthetic score.
    """
    if numbers.ndim != 2 or len(numbers) != len(pooled):
        raise ValueError(
            f"numbers: expected shape (B, K) with B = {len(pooled)} as the pooled text has, got"
            f" {tuple(numbers.shape)}"
        )
    return torch.cat([pooled, sinusoid(numbers, dim).flatten(1).to(pooled.dtype)], dim=1)


class VectorMLP(nn.Module):
    """Linear, SiLU, Linear: what turns the timestep's sinusoid, or a pooled vector, into the embedding of
    every ResBlock."""

    def __init__(self, in_dim: int, dim: int, *, extra_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        if extra_dim is not None:
            self.cond_proj = nn.Linear(extra_dim, in_dim, bias=False)  # LCM's guidance embedding enters here

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        if extra is not None:
            x = x + self.cond_proj(extra)
        return self.linear_2(F.silu(self.linear_1(x)))
