"""The way down and the middle of a UNet, which ControlNets share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.layers.attention import AttentionBlock
from ldm.models.layers.embeddings import VectorMLP, guidance_sinusoid, one_time, sinusoid
from ldm.models.layers.modules import ModuleListOf
from ldm.models.layers.resblock import Downsample, Resample, ResBlock, Upsample
from ldm.models.layers.transformer import SpatialTransformer
from ldm.models.unet_config import UNetConfig


class UNetLevel(nn.Module):
    """Residual blocks at one size, each followed by attention if the level has any, then a change of size.

    Args:
        config: Shape of the UNet.
        level: Index of the level, 0 for the largest size.
        widths: Input channels of each residual block.
        emb_dim: Width D of the time embedding.
        resample: "down", "up", or None for a level that keeps its size.
    """

    def __init__(
        self, config: UNetConfig, level: int, widths: list[int], emb_dim: int, resample: Resample | None
    ) -> None:
        super().__init__()
        width = config.channels[level]
        self.resnets: ModuleListOf[ResBlock] = ModuleListOf(
            ResBlock(w, width, emb_dim=emb_dim, scale_shift=config.scale_shift, dropout=config.dropout)
            for w in widths
        )
        only_cross = config.only_cross is not None and config.only_cross[level]
        depth = config.depth[level]
        self.attentions: ModuleListOf[AttentionBlock | SpatialTransformer] | None = (
            ModuleListOf(make_attention(config, level, depth, only_cross) for _ in widths) if depth else None
        )
        # lists of one element, because the published names are downsamplers.0 and upsamplers.0
        self.downsamplers: ModuleListOf[Downsample | ResBlock] | None = None
        self.upsamplers: ModuleListOf[Upsample | ResBlock] | None = None
        if resample is None:
            return
        if config.resample == "resblock":
            resizing = ResBlock(
                width,
                width,
                emb_dim=emb_dim,
                scale_shift=config.scale_shift,
                resample=resample,
                dropout=config.dropout,
            )
            if resample == "down":
                self.downsamplers = ModuleListOf([resizing])
            else:
                self.upsamplers = ModuleListOf([resizing])
        elif resample == "down":
            self.downsamplers = ModuleListOf([Downsample(width)])
        else:
            self.upsamplers = ModuleListOf([Upsample(width)])

    def block(self, i: int, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the output of residual block i and of the attention after it.

        Args:
            i: Index of the residual block.
            x: Feature map, shape (B, widths[i], h, w).
            emb: Time embedding, shape (B, D).
            context: Shape (B, L, D_c), or None.
            mask: True for tokens that are attended to, bool, shape (B, L), or None.

        Returns:
            Shape (B, C, h, w).
        """
        x = self.resnets[i](x, emb)  # (B, C, h, w)
        return x if self.attentions is None else self.attentions[i](x, context, mask)

    @property
    def takes_feature(self) -> int | None:
        """The block whose output features are added to: the last one; without attention, the downsampler."""
        last = len(self.resnets) - 1
        return None if self.attentions is None and self.downsamplers is not None else last

    def downsample(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return x (B, C, h, w) at half the size, for a level with a downsampler."""
        assert self.downsamplers is not None
        layer = self.downsamplers[0]
        return layer(x, emb) if isinstance(layer, ResBlock) else layer(x)

    def upsample(self, x: Tensor, emb: Tensor, size: tuple[int, int]) -> Tensor:
        """Return x (B, C, h, w) at `size`, about twice the size, for a level with an upsampler."""
        assert self.upsamplers is not None
        layer = self.upsamplers[0]
        return layer(x, emb) if isinstance(layer, ResBlock) else layer(x, size)


class UNetMid(nn.Module):
    """Residual block, attention (if `mid_depth` is not 0) and residual block at the smallest size."""

    def __init__(self, config: UNetConfig, emb_dim: int) -> None:
        super().__init__()
        width, last = config.channels[-1], len(config.channels) - 1
        self.resnets: ModuleListOf[ResBlock] = ModuleListOf(
            ResBlock(width, width, emb_dim=emb_dim, scale_shift=config.scale_shift, dropout=config.dropout)
            for _ in range(2)
        )
        self.attentions: ModuleListOf[AttentionBlock | SpatialTransformer] | None = (
            ModuleListOf([make_attention(config, last, config.mid_depth)]) if config.mid_depth else None
        )

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the output (B, C, h, w) for x (B, C, h, w); the other arguments as in `UNetLevel.block`."""
        x = self.resnets[0](x, emb)  # (B, C, h, w)
        if self.attentions is not None:
            x = self.attentions[0](x, context, mask)  # (B, C, h, w)
        return self.resnets[1](x, emb)


def make_attention(
    config: UNetConfig, level: int, depth: int, only_cross: bool = False
) -> AttentionBlock | SpatialTransformer:
    """Return the attention that follows a residual block.

    Args:
        config: Shape of the UNet.
        level: Index of the level.
        depth: Number of transformer blocks; ignored for `AttentionBlock`s.
        only_cross: See `SpatialTransformer`. Default: False.
    """
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


class UNetEncoder(nn.Module):
    """The embeddings, the way down and the middle of a UNet."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
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
        self.down_blocks: ModuleListOf[UNetLevel] = ModuleListOf()
        width = channels[0]
        for level in range(len(channels)):
            widths = [width] + [channels[level]] * (config.blocks - 1)
            last = level == len(channels) - 1
            self.down_blocks.append(UNetLevel(config, level, widths, emb_dim, None if last else "down"))
            width = channels[level]
        self.mid_block = UNetMid(config, emb_dim)

    def down_path(self) -> list[tuple[UNetLevel, int | None]]:
        """Return the level and the block of each step on the way down; a change of size has no block."""
        return [
            (level, i)
            for level in self.down_blocks
            for i in (*range(self.config.blocks), *([None] if level.downsamplers is not None else []))
        ]

    def way_down(
        self, x: Tensor, emb: Tensor, cond: Cond, steps: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last map, and the maps that the way up reads, in the order in which they arise.

        Args:
            x: Output of `conv_in`, shape (B, channels[0], h, w).
            emb: Time embedding, shape (B, D).
            cond: The condition: `context` with its mask, and `features`.
            steps: Number of the steps of `down_path` that are taken. Default: all.
        """
        skips, features = [x], list(cond.features or ())
        for level, i in self.down_path()[:steps]:
            if i is None:
                x = level.downsample(x, emb)  # (B, channels[level], h'/2, w'/2)
            else:
                x = level.block(i, x, emb, cond.context, cond.context_mask)  # (B, channels[level], h', w')
            if features and i == level.takes_feature:
                x = x + features.pop(0)
            skips.append(x)
        return x, skips

    def check(self, x: Tensor, cond: Cond) -> None:
        """Raise ValueError for an input or a condition that the network does not take.

        Args:
            x: x_t and `Cond.concat`, concatenated, shape (B, C_in, h, w).
            cond: The condition.

        Raises:
            ValueError: If x has another number of channels or a size that cannot be halved, if a condition
                that the network requires is missing, or if one that it does not read is given.
        """
        config = self.config
        if x.shape[1] != config.in_channels:
            raise ValueError(
                f"input has {x.shape[1]} channels, this UNet takes {config.in_channels} (x_t and Cond.concat"
                " together)"
            )
        if config.resample == "resblock" and (x.shape[-2] % config.factor or x.shape[-1] % config.factor):
            raise ValueError(
                f"input size {x.shape[-2]}×{x.shape[-1]}: this UNet halves sizes by averaging, expected"
                f" multiples of {config.factor}"
            )
        if config.takes_context and cond.context is None:
            raise ValueError("this UNet attends to a context: Cond.context is None")
        if config.guidance_dim and cond.guidance is None:
            raise ValueError("this UNet takes the guidance scale: Cond.guidance is None")
        width = config.pooled_dim or config.class_dim or (4 * config.channels[0] if config.embedded else None)
        if (width or config.classes) and cond.pooled is None:
            kind = f"a pooled condition of width {width}" if width else f"one of {config.classes} classes"
            raise ValueError(f"this UNet takes {kind}: Cond.pooled is None")
        reads = {
            "context": config.takes_context,
            "pooled": width or config.classes,
            "guidance": config.guidance_dim,
            "exemplars": False,
            "hints": False,
        }
        for key, value in cond.items():
            name = key.partition(".")[0]
            if not reads.get(name, True):
                raise ValueError(
                    f"this UNet takes no Cond.{name}, expected None, got shape {tuple(value.shape)}"
                )
        levels = len(config.channels)
        if cond.features is not None and len(cond.features) not in (levels, levels + 1):
            raise ValueError(
                f"Cond.features: this UNet takes {levels} maps, or one more for its middle, got"
                f" {len(cond.features)}"
            )
        if cond.residuals is not None and len(cond.residuals) != len(config.skips) + 1:
            raise ValueError(
                f"Cond.residuals: this UNet takes {len(config.skips) + 1} maps, got {len(cond.residuals)}"
            )

    def embed(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """Return the embedding of the timesteps and of the conditions that are added to it.

        Args:
            t: Timesteps, shape (B,).
            cond: The condition, of which `pooled` and `guidance` are read.
            dtype: The dtype of the embedding.

        Returns:
            Shape (B, 4·channels[0]), or (1, 4·channels[0]) if it is one for all rows; see `one_time`.

        Raises:
            ValueError: If classes are not integers of shape (B,), or out of range.
        """
        guidance = None
        if self.config.guidance_dim is not None and cond.guidance is not None:
            guidance = guidance_sinusoid(cond.guidance, self.config.guidance_dim).to(dtype)  # (B, D_g)
        times = sinusoid(one_time(t), self.config.channels[0]).to(dtype)  # (B, channels[0]), or one row
        emb = self.time_embedding(times, guidance)  # (B, D)
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
                f"Cond.pooled: this UNet takes classes, expected integers of shape (B,), got {pooled.dtype}"
                f" {tuple(pooled.shape)}"
            )
        if pooled.numel() and not 0 <= int(pooled.min()) <= int(pooled.max()) < classes:
            raise ValueError(f"Cond.pooled: expected classes from 0 to {classes - 1}, got {pooled.tolist()}")
        return emb + self.class_embedding(pooled).to(dtype)
