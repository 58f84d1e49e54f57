"""Timesteps as vectors."""

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
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class VectorMLP(nn.Module):
    """Linear, SiLU, Linear: what turns the timestep's sinusoid, or a pooled vector, into the embedding of every ResBlock."""

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
