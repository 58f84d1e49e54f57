"""Residual blocks, and layers that halve or double the size of a feature map."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.norm import apply_norm, make_norm

Resample = Literal["up", "down"]


class ResBlock(nn.Module):
    """Residual block: norm, SiLU and convolution, twice; the time embedding enters in between.

    Args:
        channels: Input channels C.
        out_channels: Output channels C_out. If they differ from C, a 1×1 convolution is the skip connection.
        emb_dim: Width D of the time embedding; None for a block without one. Default: None.
        eps: Constant added to the variance in the norms. Default: 1e-5.
        scale_shift: True if the embedding scales and shifts the second norm (Dhariwal & Nichol 2021), False
            if it is added before that norm. Default: False.
        resample: "up" doubles the size by repetition, "down" halves it by averaging. None keeps it.
            Default: None.
        dropout: Dropout probability before the second convolution, in [0, 1). Default: 0.
        spatial: Channels C_z of a latent that modulates both norms (`SpatialNorm`). None for group norms.
            Default: None.
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
        """Return the output of the block.

        Args:
            x: Feature map, shape (B, C, h, w).
            emb: Time embedding, shape (B, D); None for a block without one.
            z: Latent that modulates the norms, shape (B, C_z, *, *); None for group norms.

        Returns:
            Shape (B, C_out, h', w'), where (h', w') is (h, w) after resampling.
        """
        h = F.silu(apply_norm(self.norm1, x, z))  # (B, C, h, w)
        if self.resample is not None:
            x, h = resize(x, self.resample), resize(h, self.resample)  # (B, C, h', w') each
        h = self.conv1(h)  # (B, C_out, h', w')
        if emb is None:
            h = apply_norm(self.norm2, h, z)  # (B, C_out, h', w')
        else:
            shift = self.time_emb_proj(F.silu(emb))[:, :, None, None]  # (B, C_out or 2·C_out, 1, 1)
            if self.scale_shift:
                scale, shift = shift.chunk(2, dim=1)  # (B, C_out, 1, 1) each
                h = self.norm2(h) * (1 + scale) + shift  # (B, C_out, h', w')
            else:
                h = self.norm2(h + shift)  # (B, C_out, h', w')
        h = F.dropout(F.silu(h), self.dropout, self.training)  # (B, C_out, h', w')
        h = self.conv2(h)  # (B, C_out, h', w')
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def resize(x: Tensor, how: Resample) -> Tensor:
    """Return x (B, C, h, w) at half the size by averaging, or at twice the size by repetition."""
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """3×3 convolution of stride 2.

    Args:
        channels: Input and output channels.
        asymmetric: Pad only right and below, as the autoencoders do. Default: False.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, h, w) at half the size; an odd size is rounded up, or down if asymmetric."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return x (B, C, h, w) at twice the size, or at `size` (h, w), for an odd size that was halved."""
        x = resize(x, "up") if size is None else F.interpolate(x, size=size, mode="nearest")  # (B, C, 2h, 2w)
        return self.conv(x)
