"""Group normalisation as this family of networks uses it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm_32(channels: int) -> int:
    """The number of groups: 32 wherever the channels allow it, as in every published model; for narrower
    networks the largest divisor of both."""
    return math.gcd(32, channels)


class SpatialNorm(nn.Module):
    """Group norm that a latent (B, C_z, h, w) scales and shifts at every position (Zheng et al. 2022, MoVQ,
    eq. 4)."""

    def __init__(self, channels: int, latent_channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(group_norm_32(channels), channels, eps=eps)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        z = F.interpolate(z, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(z) + self.conv_b(z)


def make_norm(channels: int, *, eps: float, spatial: int | None = None) -> nn.Module:
    """A group norm, or with the channels of a latent the norm that it modulates."""
    return (
        nn.GroupNorm(group_norm_32(channels), channels, eps=eps)
        if spatial is None
        else SpatialNorm(channels, spatial, eps=eps)
    )


def normed(norm: nn.Module, x: Tensor, z: Tensor | None) -> Tensor:
    """The norm of x, modulated where it is of the kind that a latent z modulates."""
    return norm(x, z) if isinstance(norm, SpatialNorm) else norm(x)
