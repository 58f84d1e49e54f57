"""The UNet of latent diffusion and its relatives (Rombach et al. 2022, section 3.3; Dhariwal & Nichol 2021;
Ronneberger et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.layers.attention import AttentionBlock, SpatialTransformer
from ldm.models.layers.embeddings import VectorMLP, guidance_sinusoid, sinusoid
from ldm.models.layers.norm import group_norm_32
from ldm.models.layers.resblock import Downsample, Resample, ResBlock, Upsample


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a UNet; the defaults are Stable Diffusion 1's.

    ``channels`` and ``depth`` have one entry a level: its width, and the transformer blocks behind each of
    its residual blocks (0: none). Either ``heads`` (one number a level, or one for all) or ``head_dim``
    (channels of a head, at every level) says how attention is split. ``blocks``: residual blocks a level on
    the way down; one more on the way up.

    ``attention``: None for transformers, "block" for AttentionBlocks, at most one behind a residual block,
    with a context only if there is a ``context_dim``. ``only_cross``: the levels whose transformers have no
    self-attention (both attend to the context). ``resample``: None for convolutions, "resblock" to change
    sizes inside residual blocks. ``scale_shift``: the embedding scales and shifts their second norm.

    Conditions that join the timestep's embedding: ``pooled_dim`` is the width of `Cond.pooled`; ``class_dim``
    is the same under the name that Stable unCLIP gave it; ``classes`` is the size of a table, and
    `Cond.pooled` then holds one whole number a sample (B,), a class or a level of noise; ``guidance_dim`` is
    the width of the sinusoid of `Cond.guidance` (latent consistency models). ``embedded``: `Cond.pooled` is
    of the embedding's own width, 4·channels[0], and is added as it is (unCLIP decoders, whose projections
    stand outside).
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    blocks: int = 2
    heads: int | tuple[int, ...] | None = 8
    head_dim: int | None = None
    context_dim: int | None = 768
    linear_projection: bool = False
    pooled_dim: int | None = None
    scale_shift: bool = False
    dropout: float = 0.0
    attention: Literal["block"] | None = None
    only_cross: tuple[bool, ...] | None = None
    resample: Literal["resblock"] | None = None
    class_dim: int | None = None
    classes: int | None = None
    guidance_dim: int | None = None
    embedded: bool | None = None

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if not levels or min(self.channels) < 1:
            raise ValueError(f"channels: expected one positive number a level, got {self.channels}")
        if len(self.depth) != levels or min(self.depth) < 0 or self.mid_depth < 0:
            raise ValueError(
                f"depth: expected {levels} numbers of 0 or more, one for each of channels, got {self.depth}"
            )
        if (self.heads is None) == (self.head_dim is None):
            raise ValueError(
                f"expected one of heads and head_dim, got heads={self.heads}, head_dim={self.head_dim}"
            )
        if isinstance(self.heads, tuple) and len(self.heads) != levels:
            raise ValueError(f"heads: expected {levels} numbers, got {self.heads}")
        for level, width in enumerate(self.channels):
            if self.depth[level] or (level == levels - 1 and self.mid_depth):
                heads, head_dim = self.split(level)
                if heads * head_dim != width:
                    raise ValueError(
                        f"level {level}: {width} channels cannot be split into {heads} heads of"
                        f" {self.head_dim or 'equal width'}"
                    )
        self._check_attention()
        given = (self.pooled_dim, self.class_dim, self.classes, self.embedded or None)
        if sum(value is not None for value in given) > 1:
            raise ValueError(
                "expected one of pooled_dim, class_dim, classes and embedded, got"
                f" {', '.join(map(str, given))}"
            )

    def _check_attention(self) -> None:
        attends = any(self.depth) or self.mid_depth > 0
        if self.attention not in (None, "block"):
            raise ValueError(f'attention: expected None or "block", got {self.attention!r}')
        if self.resample not in (None, "resblock"):
            raise ValueError(f'resample: expected None or "resblock", got {self.resample!r}')
        if self.attention == "block" and max(*self.depth, self.mid_depth) > 1:
            raise ValueError(
                f"depth: AttentionBlocks do not stack, expected 0 or 1, got {self.depth} and mid_depth"
                f" {self.mid_depth}"
            )
        if self.attention is None and attends and self.context_dim is None:
            raise ValueError(
                'context_dim: transformers attend to a context, expected its width; attention="block" can do'
                " without"
            )
        if self.only_cross is not None and (
            len(self.only_cross) != len(self.channels) or self.attention is not None
        ):
            raise ValueError(
                f"only_cross: expected {len(self.channels)} truth values for transformers, got"
                f" {self.only_cross}"
            )

    def split(self, level: int) -> tuple[int, int]:
        """(number of heads, channels of a head) of the attention at a level."""
        width = self.channels[level]
        if self.head_dim is not None:
            return width // self.head_dim, self.head_dim
        heads = self.heads[level] if isinstance(self.heads, tuple) else self.heads
        assert heads is not None
        return heads, width // heads

    @property
    def takes_context(self) -> bool:
        """Whether anything in the network attends to `Cond.context`."""
        return self.context_dim is not None and (any(self.depth) or self.mid_depth > 0)

    @property
    def factor(self) -> int:
        """How often the smallest level halves the input: sizes that are multiples of it never round."""
        return 2 ** (len(self.channels) - 1)


class UNetLevel(nn.Module):
    """Residual blocks at one size, each followed by attention if the level has any, and a change of size
    behind them."""

    def __init__(
        self, config: UNetConfig, level: int, widths: list[int], emb_dim: int, resample: Resample | None
    ) -> None:
        super().__init__()
        width = config.channels[level]
        self.resnets = nn.ModuleList(
            ResBlock(w, width, emb_dim=emb_dim, scale_shift=config.scale_shift, dropout=config.dropout)
            for w in widths
        )
        only_cross = config.only_cross is not None and config.only_cross[level]
        depth = config.depth[level]
        self.attentions = (
            nn.ModuleList(attention(config, level, depth, only_cross) for _ in widths) if depth else None
        )
        if resample is not None:
            resize: nn.Module
            if config.resample == "resblock":
                resize = ResBlock(
                    width,
                    width,
                    emb_dim=emb_dim,
                    scale_shift=config.scale_shift,
                    resample=resample,
                    dropout=config.dropout,
                )
            else:
                resize = Downsample(width) if resample == "down" else Upsample(width)
            setattr(self, f"{resample}samplers", nn.ModuleList([resize]))

    def block(self, i: int, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """The i-th residual block and what attends behind it."""
        x = self.resnets[i](x, emb)
        return x if self.attentions is None else self.attentions[i](x, context, mask)


class UNetMid(nn.Module):
    """Block, attention, block at the smallest size."""

    def __init__(self, config: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        width, last = config.channels[-1], len(config.channels) - 1
        self.resnets = nn.ModuleList(
            ResBlock(width, width, emb_dim=emb_dim, scale_shift=config.scale_shift, dropout=config.dropout)
            for _ in range(2)
        )
        self.attentions = (
            nn.ModuleList([attention(config, last, config.mid_depth)]) if config.mid_depth else None
        )

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.resnets[0](x, emb)
        if self.attentions is not None:
            x = self.attentions[0](x, context, mask)
        return self.resnets[1](x, emb)


def attention(config: UNetConfig, level: int, depth: int, only_cross: bool = False) -> nn.Module:
    """What attends behind a residual block of a level."""
    width, (heads, head_dim) = config.channels[level], config.split(level)
    if config.attention == "block":
        return AttentionBlock(width, heads=heads, head_dim=head_dim, context_dim=config.context_dim)
    assert config.context_dim is not None
    return SpatialTransformer(
        width,
        heads=heads,
        head_dim=head_dim,
        depth=depth,
        context_dim=config.context_dim,
        linear=config.linear_projection,
        only_cross=only_cross,
    )


class UNet(nn.Module):
    """net(x_t, t, cond) → the raw prediction, for any size of x_t."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = config.channels, len(config.channels)
        emb_dim = 4 * channels[0]
        self.time_embedding = VectorMLP(channels[0], emb_dim, extra_dim=config.guidance_dim)
        self.add_embedding = VectorMLP(config.pooled_dim, emb_dim) if config.pooled_dim else None
        self.class_embedding: nn.Module | None = None
        if config.class_dim or config.classes:
            self.class_embedding = (
                VectorMLP(config.class_dim, emb_dim)
                if config.class_dim
                else nn.Embedding(config.classes or 0, emb_dim)
            )

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width, skips = channels[0], [channels[0]]
        for level in range(levels):
            widths = [width] + [channels[level]] * (config.blocks - 1)
            last = level == levels - 1
            self.down_blocks.append(UNetLevel(config, level, widths, emb_dim, None if last else "down"))
            width = channels[level]
            skips += [width] * (config.blocks + (not last))

        self.mid_block = UNetMid(config, emb_dim)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            widths = []
            for _ in range(config.blocks + 1):
                widths.append(width + skips.pop())
                width = channels[level]
            self.up_blocks.append(UNetLevel(config, level, widths, emb_dim, "up" if level > 0 else None))
        self.conv_norm_out = nn.GroupNorm(group_norm_32(channels[0]), channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t (B, C, h, w); t (B,) in timesteps; `Cond.context` (B, L, D) with its mask, `Cond.pooled`,
        `Cond.concat` → (B, C_out, h, w)."""
        x = x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1)
        self.check(x, cond)
        emb = self.embed(t, cond, x_t.dtype)  # (B, 4·channels[0])
        context, mask = cond.context, cond.context_mask

        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(self.config.blocks):
                x = level.block(i, x, emb, context, mask)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = (
                    level.downsamplers[0](x)
                    if self.config.resample is None
                    else level.downsamplers[0](x, emb)
                )
                skips.append(x)
        x = self.mid_block(x, emb, context, mask)
        for level in self.up_blocks:
            for i in range(self.config.blocks + 1):
                x = level.block(i, torch.cat([x, skips.pop()], dim=1), emb, context, mask)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[-2:] if self.config.resample is None else emb)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def check(self, x: Tensor, cond: Cond) -> None:
        """ValueError for an input (x_t and `Cond.concat`) or a condition that this network cannot take, or a
        condition that it lacks."""
        config = self.config
        if x.shape[1] != config.in_channels:
            raise ValueError(
                f"input has {x.shape[1]} channels, this UNet takes {config.in_channels} (x_t and Cond.concat"
                " together)"
            )
        if config.resample == "resblock" and (x.shape[-2] % config.factor or x.shape[-1] % config.factor):
            raise ValueError(
                f"input size {x.shape[-2]}×{x.shape[-1]}: this UNet halves by averages, expected multiples of"
                f" {config.factor}"
            )
        if config.takes_context and cond.context is None:
            raise ValueError("this UNet attends to a context: Cond.context is None")
        if config.guidance_dim and cond.guidance is None:
            raise ValueError("this UNet takes the guidance scale: Cond.guidance is None")
        wanted = (
            config.pooled_dim or config.class_dim or (4 * config.channels[0] if config.embedded else None)
        )
        if (wanted or config.classes) and cond.pooled is None:
            kind = f"a pooled condition of width {wanted}" if wanted else f"one of {config.classes} classes"
            raise ValueError(f"this UNet takes {kind}: Cond.pooled is None")
        unused = {
            "context": config.takes_context,
            "pooled": wanted or config.classes,
            "guidance": config.guidance_dim,
        }
        for name, taken in unused.items():
            if not taken and getattr(cond, name) is not None:
                raise ValueError(
                    f"this UNet takes no Cond.{name}, expected None, got shape"
                    f" {tuple(getattr(cond, name).shape)}"
                )

    def embed(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """The embedding that every residual block receives: the timestep's, and those of the conditions that
        join it; (B, 4·channels[0])."""
        guidance = None
        if self.config.guidance_dim is not None and cond.guidance is not None:
            guidance = guidance_sinusoid(cond.guidance, self.config.guidance_dim).to(dtype)
        emb = self.time_embedding(sinusoid(t, self.config.channels[0]).to(dtype), guidance)
        pooled, classes = cond.pooled, self.config.classes
        if pooled is None:
            return emb
        if self.config.embedded:
            return emb + pooled.to(dtype)
        if self.add_embedding is not None:
            return emb + self.add_embedding(pooled.to(dtype))
        assert self.class_embedding is not None
        if classes is None:
            return emb + self.class_embedding(pooled.to(dtype))
        if pooled.ndim != 1 or pooled.is_floating_point():
            raise ValueError(
                f"Cond.pooled: this UNet takes classes, expected whole numbers (B,), got {pooled.dtype}"
                f" {tuple(pooled.shape)}"
            )
        if pooled.numel() and not 0 <= int(pooled.min()) <= int(pooled.max()) < classes:
            raise ValueError(f"Cond.pooled: expected classes from 0 to {classes - 1}, got {pooled.tolist()}")
        return emb + self.class_embedding(pooled)
