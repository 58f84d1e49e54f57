"""Group normalization as the networks of this family use it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm_32(channels: int) -> int:
    """Return the number of groups: 32, or its greatest common divisor with the channels if that is less."""
    return math.gcd(32, channels)


class SpatialNorm(nn.Module):
    """Group norm that a latent scales and shifts at every position (Zheng et al. 2022, MoVQ, eq. 4).

    Args:
        channels: Channels C of the normalized map.
        latent_channels: Channels C_z of the latent.
        eps: Constant added to the variance. Default: 1e-6.
    """

    def __init__(self, channels: int, latent_channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(group_norm_32(channels), channels, eps=eps)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the normalized map.

        Args:
            x: Feature map, shape (B, C, h, w).
            z: Latent of any size, shape (B, C_z, h', w'); it is resized to (h, w) by nearest neighbour.

        Returns:
            Shape (B, C, h, w).
        """
        z = F.interpolate(z, size=x.shape[-2:], mode="nearest")  # (B, C_z, h, w)
        return self.norm_layer(x) * self.conv_y(z) + self.conv_b(z)


def make_norm(channels: int, *, eps: float, spatial: int | None = None) -> nn.GroupNorm | SpatialNorm:
    """Return a group norm, or a `SpatialNorm` if `spatial`, the channels of a latent, is given."""
    if spatial is None:
        return nn.GroupNorm(group_norm_32(channels), channels, eps=eps)
    return SpatialNorm(channels, spatial, eps=eps)


def apply_norm(norm: nn.GroupNorm | SpatialNorm, x: Tensor, z: Tensor | None) -> Tensor:
    """Return `norm` of the map x (B, C, h, w); only a `SpatialNorm` reads the latent z (B, C_z, h', w')."""
    return norm(x, z) if isinstance(norm, SpatialNorm) else norm(x)
