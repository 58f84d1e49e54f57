"""T2I-Adapter (Mou et al. 2023, arXiv:2302.08453): four maps of a hint, added on a UNet's way down.

The hint is rearranged by a pixel-unshuffle to the size of the latent (in XL: half of it). Residual blocks,
with average pools between levels, give one map for each level, which does not depend on the timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.control.controlled import Added, MapsOnly
from ldm.models.layers.modules import ModuleListOf


@dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig:
    """Shape of a T2I-Adapter; the defaults are those for Stable Diffusion 1.

    Args:
        hint_channels: Channels of the hint, 3 or 1. Default: 3.
        unshuffle: Side of the squares of the hint that become one position. Default: 8.
        channels: Channels of each map. Default: 320, 640, 1280, 1280.
        halved: For each map, whether the size is halved before it. Default: all but the first.
        blocks: Residual blocks of a level. Default: 2.
        light: Whether levels compute with a quarter of their channels, without a first convolution (the light
            adapter). Default: False.

    Raises:
        ValueError: If a number is not positive, or `halved` has another length than `channels`.
    """

    hint_channels: int = 3
    unshuffle: int = 8
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    halved: tuple[bool, ...] = (False, True, True, True)
    blocks: int = 2
    light: bool = False

    def __post_init__(self) -> None:
        numbers = (self.hint_channels, self.unshuffle, self.blocks, *self.channels)
        if min(numbers) < 1 or len(self.halved) != len(self.channels):
            raise ValueError(
                f"expected positive numbers and {len(self.channels)} truth values in halved, got {self}"
            )


class AdapterResidual(nn.Module):
    """x + conv(relu(conv(x))), the first of the convolutions 3×3, the second of side `side`."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, side, padding=side // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, C, h, w) for x (B, C, h, w)."""
        return x + self.block2(F.relu(self.block1(x)))


class AdapterLevel(nn.Module):
    """An average pool if the size is halved, a 1×1 convolution if channels change, and residual blocks."""

    def __init__(self, config: T2IAdapterConfig, level: int, in_channels: int) -> None:
        super().__init__()
        width = config.channels[level]
        inner = width // 4 if config.light else width
        self.halved = config.halved[level]
        change = config.light or in_channels != width
        self.in_conv = nn.Conv2d(in_channels, inner, 1) if change else None
        self.resnets: ModuleListOf[AdapterResidual] = ModuleListOf(
            AdapterResidual(inner, 3 if config.light else 1) for _ in range(config.blocks)
        )
        self.out_conv = nn.Conv2d(inner, width, 1) if config.light else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the map (B, C, h', w') of x (B, C_in, h, w)."""
        if self.halved:
            x = F.avg_pool2d(x, 2, ceil_mode=True)  # (B, C_in, h/2, w/2)
        x = x if self.in_conv is None else self.in_conv(x)  # (B, inner, h', w')
        for block in self.resnets:
            x = block(x)  # (B, inner, h', w')
        return x if self.out_conv is None else self.out_conv(x)


class T2IAdapter(nn.Module):
    """The network that returns one map for each level."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hint_channels * config.unshuffle**2
        self.conv_in: nn.Conv2d | None = None
        if not config.light:
            self.conv_in = nn.Conv2d(width, config.channels[0], 3, padding=1)
            width = config.channels[0]
        self.body: ModuleListOf[AdapterLevel] = ModuleListOf()
        for level, channels in enumerate(config.channels):
            self.body.append(AdapterLevel(config, level, width))
            width = channels

    def forward(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Return the maps, each (B, C, h', w'), of hints (B, C_hint, H, W).

        Raises:
            ValueError: If the sides of the hints are no multiples of `unshuffle`.
        """
        side = self.config.unshuffle
        if hint.shape[-2] % side or hint.shape[-1] % side:
            raise ValueError(
                f"hint: {hint.shape[-1]}×{hint.shape[-2]}: this T2I-Adapter takes multiples of {side}"
            )
        x = F.pixel_unshuffle(hint, side)  # (B, C_hint·side², h, w)
        x = x if self.conv_in is None else self.conv_in(x)  # (B, channels[0], h, w)
        maps = []
        for level in self.body:
            x = level(x)  # (B, channels[level], h', w')
            maps.append(x)
        return tuple(maps)


@dataclass(frozen=True, kw_only=True, eq=False)
class T2IAdapterKind(MapsOnly):
    """A `T2IAdapter`, as a `ControlKind`; in guess mode its maps are the same."""

    network: T2IAdapter

    @property
    def count(self) -> int:
        """Number of its maps."""
        return len(self.network.body)

    @property
    def factor(self) -> int:
        """Size of a hint divided by that of the latent."""
        config = self.network.config
        return config.unshuffle // (1 if any(config.halved[:2]) else 2)

    @property
    def hint_channels(self) -> int:
        """Channels of a hint."""
        return self.network.config.hint_channels

    def prepare(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of hints (B, C, H, W)."""
        maps: tuple[Tensor, ...] = self.network(hint)
        return maps

    def added(
        self, x_t: Tensor, t: Tensor, cond: Cond, prepared: Sequence[Tensor], *, strength: float, guess: bool
    ) -> Added:
        """Return the features; the arguments are those of `ControlKind.added`."""
        return {"features": tuple(strength * each for each in prepared)}
