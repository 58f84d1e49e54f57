"""Sinusoidal embeddings of timesteps and other numbers, and the MLP that projects them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(t: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """Return [cos, sin] of t · max_period^(−i/half) for i = 0 … half − 1, half = dim // 2 (Ho et al. 2020).

    Args:
        t: Numbers of any shape (...,), for instance timesteps; they may be fractional.
        dim: Width of the embedding.
        max_period: Base of the frequencies, which fall from 1 towards 1 / max_period. Default: 10000.

    Returns:
        Shape (..., dim), float32.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device)
    )
    angles = t.float()[..., None] * frequencies  # (..., half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def one_time(t: Tensor) -> Tensor:
    """Return timesteps t (B,), or the first of them, (1,), if t is one number expanded to B.

    The embedding of the time is a matrix product of as many rows as there are timesteps, and libraries round
    products of few rows in ways that depend on their number. With one row for one time, an image does not
    depend on how many are sampled with it.
    """
    return t[:1] if len(t) > 1 and t.stride(0) == 0 else t


def guidance_sinusoid(scale: Tensor, dim: int = 256) -> Tensor:
    """Return the guidance embedding of latent consistency models (Luo et al. 2023, section 4.3).

    It is [sin, cos] (the opposite order of `sinusoid`) of 1000 · (scale − 1) · 10000^(−i/(half − 1)).

    Args:
        scale: Guidance scale, shape (B,); 1 is no guidance. The paper's w is `scale` − 1.
        dim: Width of the embedding. Default: 256.

    Returns:
        Shape (B, dim), float32.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10_000.0) / (half - 1) * torch.arange(half, dtype=torch.float32, device=scale.device)
    )
    angles = 1000.0 * (scale.float()[..., None] - 1.0) * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def vector_condition(pooled: Tensor, numbers: Tensor, dim: int = 256) -> Tensor:
    """Return the vector condition of SDXL (Podell et al. 2023, section 2.2).

    Args:
        pooled: Pooled text embedding, shape (B, E).
        numbers: Shape (B, K). Base model: original height and width, crop top and left, target height and
            width, in pixels. Refiner: original height and width, crop top and left, aesthetic score.
        dim: Width of the sinusoid of each number. Default: 256.

    Returns:
        `pooled` followed by the sinusoids, shape (B, E + K·dim), in the dtype of `pooled`.

    Raises:
        ValueError: If `numbers` does not have shape (B, K).
    """
    if numbers.ndim != 2 or len(numbers) != len(pooled):
        raise ValueError(
            f"numbers: expected shape (B, K) with B = {len(pooled)} as in the pooled text, got"
            f" {tuple(numbers.shape)}"
        )
    return torch.cat([pooled, sinusoid(numbers, dim).flatten(1).to(pooled.dtype)], dim=1)


class VectorMLP(nn.Module):
    """Linear, SiLU, linear: projects a sinusoid or a pooled vector to the embedding of residual blocks.

    Args:
        in_dim: Width of the input.
        dim: Width D of the output.
        extra_dim: Width of a second input, the guidance embedding of latent consistency models, which is
            projected and added to the first one. None for none. Default: None.
    """

    def __init__(self, in_dim: int, dim: int, *, extra_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        if extra_dim is not None:
            self.cond_proj = nn.Linear(extra_dim, in_dim, bias=False)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """Return the embedding (B, D) of x (B, in_dim) and, if given, `extra` (B, extra_dim)."""
        if extra is not None:
            x = x + self.cond_proj(extra)  # (B, in_dim)
        return self.linear_2(F.silu(self.linear_1(x)))
