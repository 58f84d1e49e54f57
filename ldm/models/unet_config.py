"""`UNetConfig`: the shape of a UNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a UNet; the defaults are those of Stable Diffusion 1.

    The last six arguments are conditions that are added to the time embedding. At most one of `pooled_dim`,
    `class_dim`, `classes` and `embedded` is given; each of them reads `Cond.pooled`.

    Args:
        in_channels: Channels of the input, x_t and `Cond.concat` together. Default: 4.
        out_channels: Channels of the prediction. Default: 4.
        channels: Channels of each level, largest size first. Each level but the last halves the size.
        depth: Transformer blocks after each residual block, one number per level; 0 for none.
        mid_depth: The same for the middle block. Default: 1.
        blocks: Residual blocks of a level on the way down; one more on the way up. Default: 2.
        heads: Attention heads, one number for all levels or one per level. None if `head_dim` is given.
        head_dim: Channels of an attention head at every level. None if `heads` is given.
        context_dim: Width of the context. None for a network without cross-attention. Default: 768.
        linear_projection: Whether transformers project with linear layers instead of 1×1 convolutions.
        pooled_dim: Width of `Cond.pooled`, which an MLP projects.
        scale_shift: Whether the embedding scales and shifts the second norm of residual blocks, instead of
            being added before it. Default: False.
        dropout: Dropout probability in residual blocks, in [0, 1). Default: 0.
        attention: None for transformers. "block" for `AttentionBlock`s, of which at most one follows a
            residual block; they attend to a context if there is a `context_dim`.
        only_cross: Levels whose transformers attend to the context twice, without self-attention; one truth
            value per level. None for no level.
        resample: None to change sizes by convolutions, "resblock" inside residual blocks.
        class_dim: The same as `pooled_dim`, under the name that Stable unCLIP gives it.
        classes: Number of classes (or noise levels) of an embedding table; `Cond.pooled` then holds one
            integer per sample, shape (B,).
        guidance_dim: Width of the sinusoid of `Cond.guidance` (latent consistency models).
        embedded: True if `Cond.pooled` has the width of the time embedding, 4·channels[0], and is added
            without a projection (unCLIP decoders, which project it outside the UNet).

    Raises:
        ValueError: If the arguments do not fit together.
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
        self._check_levels()
        self._check_attention()
        given = (self.pooled_dim, self.class_dim, self.classes, self.embedded or None)
        if sum(value is not None for value in given) > 1:
            raise ValueError(
                "expected at most one of pooled_dim, class_dim, classes and embedded, got"
                f" {', '.join(map(str, given))}"
            )

    def _check_levels(self) -> None:
        levels = len(self.channels)
        if not levels or min(self.channels) < 1:
            raise ValueError(f"channels: expected one positive number per level, got {self.channels}")
        if len(self.depth) != levels or min(self.depth) < 0 or self.mid_depth < 0:
            raise ValueError(
                f"depth: expected {levels} numbers of 0 or more, one for each of channels, got {self.depth}"
                f" and mid_depth {self.mid_depth}"
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
                "context_dim: transformers attend to a context, expected its width, got None;"
                ' attention="block" works without a context'
            )
        if self.only_cross is not None and (
            len(self.only_cross) != len(self.channels) or self.attention is not None
        ):
            raise ValueError(
                f"only_cross: expected {len(self.channels)} truth values for transformers, got"
                f" {self.only_cross}"
            )

    def split(self, level: int) -> tuple[int, int]:
        """Return the number of attention heads of a level, and the channels of a head."""
        width = self.channels[level]
        if self.head_dim is not None:
            return width // self.head_dim, self.head_dim
        heads = self.heads[level] if isinstance(self.heads, tuple) else self.heads
        assert heads is not None
        return heads, width // heads

    @property
    def takes_context(self) -> bool:
        """Whether any layer attends to `Cond.context`."""
        return self.context_dim is not None and (any(self.depth) or self.mid_depth > 0)

    @property
    def skips(self) -> tuple[int, ...]:
        """Channels of the maps that the way up reads, in the order in which they arise."""
        found = [self.channels[0]]
        for level, width in enumerate(self.channels):
            found += [width] * (self.blocks + (level < len(self.channels) - 1))
        return tuple(found)

    @property
    def factor(self) -> int:
        """Input size divided by the smallest size; multiples of it are halved without rounding."""
        return 2 ** (len(self.channels) - 1)

    @property
    def multiple(self) -> int:
        """The number of which the sides of the input must be multiples."""
        return self.factor if self.resample == "resblock" else 1
