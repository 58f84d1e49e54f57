"""The cross-attention UNet of latent diffusion (Rombach et al. 2022, section 3.3; Ronneberger et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import SpatialTransformer
from ldm.nn.embeddings import VectorMLP, sinusoid
from ldm.nn.norm import group_norm_32
from ldm.nn.resblock import Downsample, ResBlock, Upsample
from ldm.types import Cond


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a UNet; the defaults are Stable Diffusion 1's.

    ``channels`` and ``depth`` have one entry a level: its width, and the transformer blocks behind each of its residual blocks (0: none).
    Either ``heads`` (one number a level, or one for all) or ``head_dim`` (channels of a head, at every level) says how attention is split.
    ``blocks``: residual blocks a level on the way down; one more on the way up. ``pooled_dim``: width of `Cond.pooled`, if it has one.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    blocks: int = 2
    heads: int | tuple[int, ...] | None = 8
    head_dim: int | None = None
    context_dim: int = 768
    linear_projection: bool = False
    pooled_dim: int | None = None
    scale_shift: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if not levels or min(self.channels) < 1:
            raise ValueError(f"channels: expected one positive number a level, got {self.channels}")
        if len(self.depth) != levels or min(self.depth) < 0 or self.mid_depth < 0:
            raise ValueError(f"depth: expected {levels} numbers of 0 or more, one for each of channels, got {self.depth}")
        if (self.heads is None) == (self.head_dim is None):
            raise ValueError(f"expected one of heads and head_dim, got heads={self.heads}, head_dim={self.head_dim}")
        if isinstance(self.heads, tuple) and len(self.heads) != levels:
            raise ValueError(f"heads: expected {levels} numbers, got {self.heads}")
        for level, width in enumerate(self.channels):
            if (self.depth[level] or (level == levels - 1 and self.mid_depth)) and width % self.split(level)[0]:
                raise ValueError(f"level {level}: {width} channels cannot be split into {self.split(level)[0]} heads")

    def split(self, level: int) -> tuple[int, int]:
        """(number of heads, channels of a head) of the attention at a level."""
        width = self.channels[level]
        if self.head_dim is not None:
            return width // self.head_dim, self.head_dim
        heads = self.heads[level] if isinstance(self.heads, tuple) else self.heads
        assert heads is not None
        return heads, width // heads

    @property
    def factor(self) -> int:
        """How often the smallest level halves the input: sizes that are multiples of it never round."""
        return 2 ** (len(self.channels) - 1)


class Level(nn.Module):
    """Residual blocks at one size, each followed by transformer blocks if the level has any, and a change of size behind them."""

    def __init__(self, config: UNetConfig, level: int, widths: list[int], emb_dim: int, resample: str | None) -> None:
        super().__init__()
        width = config.channels[level]
        self.resnets = nn.ModuleList(
            ResBlock(w, width, emb_dim=emb_dim, scale_shift=config.scale_shift, dropout=config.dropout) for w in widths
        )
        self.attentions = nn.ModuleList(transformer(config, level, config.depth[level]) for _ in widths) if config.depth[level] else None
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(width)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def block(self, i: int, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """The i-th residual block and what attends behind it."""
        x = self.resnets[i](x, emb)
        return x if self.attentions is None else self.attentions[i](x, context, mask)


class Mid(nn.Module):
    """Block, transformer, block at the smallest size."""

    def __init__(self, config: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        width, last = config.channels[-1], len(config.channels) - 1
        self.resnets = nn.ModuleList(
            ResBlock(width, width, emb_dim=emb_dim, scale_shift=config.scale_shift, dropout=config.dropout) for _ in range(2)
        )
        self.attentions = nn.ModuleList([transformer(config, last, config.mid_depth)]) if config.mid_depth else None

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.resnets[0](x, emb)
        if self.attentions is not None:
            x = self.attentions[0](x, context, mask)
        return self.resnets[1](x, emb)


def transformer(config: UNetConfig, level: int, depth: int) -> SpatialTransformer:
    """The spatial transformer of a level."""
    heads, head_dim = config.split(level)
    return SpatialTransformer(
        config.channels[level], heads=heads, head_dim=head_dim, depth=depth, context_dim=config.context_dim, linear=config.linear_projection
    )


class UNet(nn.Module):
    """net(x_t, t, cond) → the raw prediction, for any size of x_t."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = config.channels, len(config.channels)
        emb_dim = 4 * channels[0]
        self.time_embedding = VectorMLP(channels[0], emb_dim)
        self.add_embedding = VectorMLP(config.pooled_dim, emb_dim) if config.pooled_dim else None

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width, skips = channels[0], [channels[0]]
        for level in range(levels):
            widths = [width] + [channels[level]] * (config.blocks - 1)
            last = level == levels - 1
            self.down_blocks.append(Level(config, level, widths, emb_dim, None if last else "down"))
            width = channels[level]
            skips += [width] * (config.blocks + (not last))

        self.mid_block = Mid(config, emb_dim)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            widths = []
            for _ in range(config.blocks + 1):
                widths.append(width + skips.pop())
                width = channels[level]
            self.up_blocks.append(Level(config, level, widths, emb_dim, "up" if level > 0 else None))
        self.conv_norm_out = nn.GroupNorm(group_norm_32(channels[0]), channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t (B, C, h, w); t (B,) in timesteps; `Cond.context` (B, L, D) with its mask, `Cond.pooled`, `Cond.concat` → (B, C_out, h, w)."""
        emb = self.embed(t, cond, x_t.dtype)  # (B, 4·channels[0])
        x = x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise ValueError(f"input has {x.shape[1]} channels, this UNet takes {self.config.in_channels} (x_t and Cond.concat together)")
        context, mask = cond.context, cond.context_mask
        if context is None and (any(self.config.depth) or self.config.mid_depth):
            raise ValueError("this UNet attends to a context: Cond.context is None")

        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(self.config.blocks):
                x = level.block(i, x, emb, context, mask)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, emb, context, mask)
        for level in self.up_blocks:
            for i in range(self.config.blocks + 1):
                x = level.block(i, torch.cat([x, skips.pop()], dim=1), emb, context, mask)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def embed(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """The embedding that every residual block receives: the timestep's, and the pooled condition's where the network takes one."""
        emb = self.time_embedding(sinusoid(t, self.config.channels[0]).to(dtype))
        if self.add_embedding is not None:
            if cond.pooled is None:
                raise ValueError(f"this UNet takes a pooled condition of width {self.config.pooled_dim}: Cond.pooled is None")
            emb = emb + self.add_embedding(cond.pooled.to(dtype))
        return emb
