"""ControlNet-LLLite (kohya-ss/sd-scripts, `networks/control_net_lllite.py`): small networks at attentions.

Each stands before a projection to queries, keys or values and changes the projection's input x by the hint:

    c = convolutions(2·hint − 1),    x ← x + strength · up(relu(mid([c, relu(down(x))])))

The convolutions reduce the hint to the positions of x. Nothing else of the UNet is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.checks import check_positive
from ldm.models.control.controlled import Added, MapsOnly
from ldm.models.layers.attention import AttentionJoin
from ldm.models.layers.modules import ModuleListOf

HINT_CHANNELS = 3
CELL = 8  # pixels of the side of a hint's cell: the size of an image divided by that of the latent
DEPTHS: Mapping[int, tuple[int, ...]] = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}
"""The strides of the convolutions, which are their kernels too, by the depth of the projection."""


@dataclass(frozen=True, kw_only=True)
class LLLiteLayer:
    """Shape of the network before one projection.

    Args:
        name: Its name in files, such as "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q".
        width: Width D of the projection's input.
        embed: Channels E of what the convolutions make of the hint, an even number.
        hidden: Width of the reduced input.
        depth: See `DEPTHS`: the convolutions reduce the hint to a half, a quarter, … of the latent's size.

    Raises:
        ValueError: If a number is out of range.
    """

    name: str
    width: int
    embed: int
    hidden: int
    depth: int

    def __post_init__(self) -> None:
        check_positive(width=self.width, embed=self.embed, hidden=self.hidden)
        if self.embed % 2 or self.depth not in DEPTHS:
            raise ValueError(
                f"{self.name}: embed {self.embed}, depth {self.depth}: expected an even number and one of"
                f" {tuple(DEPTHS)}"
            )


@dataclass(frozen=True, kw_only=True)
class LLLiteConfig:
    """Shape of an `LLLite`.

    Args:
        layers: Its networks, at least one.
    """

    layers: tuple[LLLiteLayer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: expected at least one")


class LLLiteModule(nn.Module):
    """The network before one projection; the names are the files'."""

    def __init__(self, layer: LLLiteLayer) -> None:
        super().__init__()
        strides = DEPTHS[layer.depth]
        widths = (HINT_CHANNELS, *[layer.embed // 2] * (len(strides) - 1), layer.embed)
        convolutions: list[nn.Module] = []
        for i, stride in enumerate(strides):
            convolutions += [nn.ReLU()] if i else []
            convolutions.append(nn.Conv2d(widths[i], widths[i + 1], stride, stride=stride))
        self.conditioning1 = nn.Sequential(*convolutions)
        self.down: ModuleListOf[nn.Linear] = ModuleListOf([nn.Linear(layer.width, layer.hidden)])
        self.mid: ModuleListOf[nn.Linear] = ModuleListOf(
            [nn.Linear(layer.embed + layer.hidden, layer.hidden)]
        )
        self.up: ModuleListOf[nn.Linear] = ModuleListOf([nn.Linear(layer.hidden, layer.width)])

    def embedding(self, pixels: Tensor) -> Tensor:
        """Return what the convolutions make of hints (B, 3, H, W) in [−1, 1], (B, L, E)."""
        return rearrange(self.conditioning1(pixels), "b e h w -> b (h w) e")

    def forward(self, x: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
        """Return the changed input (B, L, D) of the projection.

        Args:
            x: The input, shape (B, L, D).
            pixels: Hints, shape (B, 3, H, W) in [−1, 1].
            weights: Factor for each sample, shape (B,).

        Raises:
            ValueError: If the hints are reduced to another number of positions than L.
        """
        c = self.embedding(pixels)  # (B, L, E)
        if c.shape[1] != x.shape[1]:
            raise ValueError(
                f"ControlNet-LLLite: the hint gives {c.shape[1]} positions, the attention has {x.shape[1]}:"
                " expected a UNet whose levels halve the size as those of Stable Diffusion XL, and a height"
                " and width that its levels divide"
            )
        y = torch.cat([c, F.relu(self.down[0](x))], dim=-1)  # (B, L, E + hidden)
        return x + self.up[0](F.relu(self.mid[0](y))) * weights[:, None, None]


class LLLite(nn.ModuleDict):
    """The networks before projections, by their names in files."""

    def __init__(self, config: LLLiteConfig) -> None:
        super().__init__({layer.name: LLLiteModule(layer) for layer in config.layers})
        self.config = config


@dataclass(frozen=True, kw_only=True, eq=False)
class LLLiteKind(MapsOnly):
    """An `LLLite`, as a `ControlKind`.

    Args:
        network: The networks.
        places: For each of them, the attention and its projection, such as ("….attn1", "to_q").
    """

    network: LLLite
    places: Mapping[str, tuple[str, str]]
    in_attentions = True
    count = 1
    factor = CELL
    hint_channels = HINT_CHANNELS

    def prepare(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Return hints (B, 3, H, W) in [0, 1] as values in [−1, 1] by cell, (B, 3·8², h, w).

        So windows can be cut out of them. What the convolutions make of them is computed in every step.
        """
        return (F.pixel_unshuffle(2 * hint - 1, CELL),)

    def added(
        self, x_t: Tensor, t: Tensor, cond: Cond, prepared: Sequence[Tensor], *, strength: float, guess: bool
    ) -> Added:
        """Return nothing: it acts before the projections of attentions."""
        return {}

    def joined(self, prepared: Sequence[Tensor], weights: Tensor) -> Mapping[str, AttentionJoin]:
        """Return what changes the inputs of projections; the arguments are those of `ControlKind`."""
        pixels = F.pixel_shuffle(prepared[0], CELL)  # (B, 3, H, W)
        found: dict[str, dict[str, partial[Tensor]]] = {}
        for name, (attention, projection) in self.places.items():
            own = partial(self.network[name], pixels=pixels, weights=weights.to(pixels.dtype))
            found.setdefault(attention, {})[projection] = own
        return {attention: AttentionJoin(inputs=own) for attention, own in found.items()}
