"""The transformer blocks of diffusion UNets, over sequences and over feature maps."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.attention import Attention
from ldm.models.layers.modules import ModuleListOf
from ldm.models.layers.norm import group_norm_32


class GEGLU(nn.Module):
    """value · gelu(gate), both linear in the input, with the exact gelu (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated values (..., inner) of x (..., width)."""
        value, gate = self.proj(x).chunk(2, dim=-1)  # (..., inner) each
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and a linear layer back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., width) for x (..., width)."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward (Rombach et al. 2022, appendix E.2.1).

    Each of the three follows a layer norm and is added to its input.

    Args:
        width: Width D of the sequence.
        heads: Number of heads.
        head_dim: Channels of a head.
        context_dim: Width D_c of the context.
        only_cross: True if the first attention attends to the context too. Default: False.
    """

    def __init__(
        self, width: int, *, heads: int, head_dim: int, context_dim: int, only_cross: bool = False
    ) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(
            width, heads=heads, head_dim=head_dim, context_dim=context_dim if only_cross else None
        )
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads=heads, head_dim=head_dim, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output (B, L, D) for x (B, L, D), context (B, M, D_c) and its mask (B, M) or None."""
        # (B, L, D)
        x = x + (self.attn1(self.norm1(x), context, mask) if self.only_cross else self.attn1(self.norm1(x)))
        x = x + self.attn2(self.norm2(x), context, mask)  # (B, L, D)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with norm, projections and residual sum.

    Args:
        channels: Channels C of the map.
        heads: Number of heads.
        head_dim: Channels of a head.
        depth: Number of transformer blocks.
        context_dim: Width D_c of the context.
        linear: True if the projections are linear layers, False for 1×1 convolutions. Default: False.
        only_cross: See `TransformerBlock`. Default: False.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        depth: int,
        context_dim: int,
        linear: bool = False,
        only_cross: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.linear = linear
        self.norm = nn.GroupNorm(group_norm_32(channels), channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks: ModuleListOf[TransformerBlock] = ModuleListOf(
            TransformerBlock(
                inner, heads=heads, head_dim=head_dim, context_dim=context_dim, only_cross=only_cross
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output (B, C, h, w) for x (B, C, h, w), context (B, M, D_c) and mask (B, M) or None."""
        h, w = x.shape[-2:]
        y = self.norm(x)  # (B, C, h, w)
        y = (
            self.proj_in(rearrange(y, "b c h w -> b (h w) c"))
            if self.linear
            else rearrange(self.proj_in(y), "b c h w -> b (h w) c")
        )  # (B, h·w, D)
        for block in self.transformer_blocks:
            y = block(y, context, mask)  # (B, h·w, D)
        if self.linear:
            return x + rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=h, w=w)
        return x + self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=h, w=w))
