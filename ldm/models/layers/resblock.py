"""Residual blocks and resampling."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.norm import make_norm, normed

Resample = Literal["up", "down"]


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with the time embedding in between, beside a skip connection.

    x (B, C, h, w), emb (B, D) or None → (B, C_out, h', w'). ``scale_shift``: the embedding scales and shifts
    the second norm (Dhariwal & Nichol 2021) where otherwise it is added. ``resample``: the block also halves
    (average) or doubles (nearest) the size. ``spatial``: the channels of a latent z (B, C_z, h', w') that
    modulates both norms.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        emb_dim: int | None = None,
        eps: float = 1e-5,
        scale_shift: bool = False,
        resample: Resample | None = None,
        dropout: float = 0.0,
        spatial: int | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.dropout = dropout
        self.norm1 = make_norm(channels, eps=eps, spatial=spatial)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if emb_dim is not None:
            self.time_emb_proj = nn.Linear(emb_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = make_norm(out_channels, eps=eps, spatial=spatial)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        h = F.silu(normed(self.norm1, x, z))
        if self.resample is not None:
            x, h = resize(x, self.resample), resize(h, self.resample)
        h = self.conv1(h)  # (B, C_out, h', w')
        if emb is None:
            h = normed(self.norm2, h, z)
        else:
            shift = self.time_emb_proj(F.silu(emb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = shift.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + shift)
        h = F.dropout(F.silu(h), self.dropout, self.training)
        h = self.conv2(h)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def resize(x: Tensor, how: Resample) -> Tensor:
    """Half the size by averaging, or twice the size by repetition."""
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """A 3×3 convolution of stride 2. ``asymmetric``: padded right and below only, as the autoencoders do."""

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution. ``size``: the exact (h, w) wanted, where halving
    had rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        x = resize(x, "up") if size is None else F.interpolate(x, size=size, mode="nearest")
        return self.conv(x)
