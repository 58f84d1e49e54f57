"""ControlNet Union (xinsir, 2024): one ControlNet for several types of hints.

The number of the type is added to the time embedding, and a transformer over the mean of the encoded hint and
the type's embedding e_k decides by how much the hint is shifted:

    c = E(hint),   y = transformer(mean c + e_k),   h = conv_in(x_t) + c + P(y),   and on as in a ControlNet

In the published program the transformer's attention runs over the images of a batch, so that the images of a
batch change one another. Here each is alone, as it is in a batch of one; with guidance, both branches of an
image have the same hint and the same x_t, and the result is that of the published program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.checks import check_positive
from ldm.models.clip.config import VisionConfig
from ldm.models.clip.transformer import CLIPBlock
from ldm.models.control.control_net import ControlNet, ControlNetConfig
from ldm.models.control.controlled import ControlNetKind
from ldm.models.layers.embeddings import VectorMLP, sinusoid
from ldm.models.layers.modules import ModuleListOf

TYPE_DIM = 256  # of the sinusoid of each type


@dataclass(frozen=True, kw_only=True)
class UnionConfig(ControlNetConfig):
    """Shape of a `UnionControlNet`.

    Args:
        types: Number of types of hints. Default: 6.
        layers: Blocks of the transformer over the hint's mean. Default: 1.
        heads: Its attention heads. Default: 8.

    Raises:
        ValueError: If a number is not positive, or the first map's channels are no multiple of `heads`.
    """

    types: int = 6
    layers: int = 1
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(types=self.types, layers=self.layers, heads=self.heads)
        if self.width % self.heads:
            raise ValueError(
                f"heads {self.heads}: expected a divisor of the first map's channels {self.width}"
            )

    @property
    def width(self) -> int:
        """Channels of the first map."""
        return self.unet.channels[0]


class UnionControlNet(ControlNet):
    """The network `net(x_t, t, cond, hint, types)` that returns the residuals of a UNet."""

    def __init__(self, config: UnionConfig) -> None:
        super().__init__(config)
        self.union = config
        width = config.width
        block = VisionConfig(width=width, heads=config.heads, layers=config.layers, activation="quick_gelu")
        self.task_embedding = nn.Parameter(width**0.5 * torch.randn(config.types, width))
        self.transformer_layes: ModuleListOf[CLIPBlock] = ModuleListOf(  # as the published files spell it
            CLIPBlock(block) for _ in range(config.layers)
        )
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = VectorMLP(TYPE_DIM * config.types, 4 * width)
        for zero in self.spatial_ch_projs.parameters():
            nn.init.zeros_(zero)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Cond, hint: Tensor, types: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the residuals, each (B, C, h', w').

        Args:
            x_t, t, cond, hint: See `ControlNet.forward`.
            types: The type of each hint, int64, shape (B,).

        Raises:
            ValueError: If an argument does not fit, or there are no types.
        """
        if types is None or types.shape != t.shape:
            raise ValueError(f"types: expected the shape {tuple(t.shape)}, got {types}")
        self.check(x_t, cond)
        one_hot = F.one_hot(types, self.union.types).to(x_t.dtype)  # (B, types)
        sinusoids = sinusoid(one_hot.flatten(), TYPE_DIM).to(x_t.dtype).unflatten(0, one_hot.shape)
        added = self.control_add_embedding(sinusoids.flatten(1))  # (B, D)
        h = self.conv_in(x_t)  # (B, channels[0], h, w)
        self.check_hint(hint, h)
        y = (hint.mean((2, 3)) + self.task_embedding[types])[:, None]  # (B, 1, channels[0])
        for block in self.transformer_layes:
            y = block(y)  # (B, 1, channels[0])
        shift = self.spatial_ch_projs(y[:, 0])[..., None, None]  # (B, channels[0], 1, 1)
        return self.residuals(h + hint + shift, self.embed(t, cond, x_t.dtype) + added, cond)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnionKind(ControlNetKind):
    """A `UnionControlNet` for hints of one type, as a `ControlKind`.

    Attributes:
        network: The network.
        type: Number of the type.
    """

    network: UnionControlNet
    type: int
    count = 2

    def prepare(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Return the encoded hint, (B, C, h, w), and its type, (B,)."""
        encoded = self.network.controlnet_cond_embedding(hint)
        return encoded, torch.full((len(hint),), self.type, device=hint.device)
