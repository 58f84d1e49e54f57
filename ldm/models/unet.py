"""The UNet of latent diffusion and its relatives (Rombach et al. 2022, section 3.3).

The architecture is that of Ronneberger et al. (2015) with the residual and attention blocks of Dhariwal &
Nichol (2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.layers.modules import ModuleListOf
from ldm.models.layers.norm import group_norm_32
from ldm.models.unet_config import UNetConfig
from ldm.models.unet_encoder import UNetEncoder, UNetLevel

__all__ = ["UNet", "UNetConfig"]


class UNet(UNetEncoder):
    """The network `net(x_t, t, cond)` that returns the raw prediction, for x_t of any size."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, skips = config.channels, list(config.skips)
        width, emb_dim = channels[-1], 4 * channels[0]
        self.up_blocks: ModuleListOf[UNetLevel] = ModuleListOf()
        for level in reversed(range(len(channels))):
            widths = []
            for _ in range(config.blocks + 1):
                widths.append(width + skips.pop())
                width = channels[level]
            self.up_blocks.append(UNetLevel(config, level, widths, emb_dim, "up" if level > 0 else None))
        self.conv_norm_out = nn.GroupNorm(group_norm_32(channels[0]), channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the raw prediction.

        Args:
            x_t: Noisy sample, shape (B, C, h, w).
            t: Timesteps, shape (B,); they may be fractional.
            cond: `context` (B, L, D_c) with its mask, `pooled`, `concat` and `guidance`, as the configuration
                requires, `features` of T2I-Adapters and `residuals` of ControlNets.

        Returns:
            Shape (B, C_out, h, w).

        Raises:
            ValueError: If x_t or the condition does not fit the configuration; see `check`.
        """
        x = x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1)  # (B, C_in, h, w)
        self.check(x, cond)
        emb = self.embed(t, cond, x_t.dtype)  # (B, 4·channels[0])
        context, mask = cond.context, cond.context_mask  # (B, L, D_c), (B, L)

        # (B, channels[-1], h', w'), and a list of (B, channels of a level, h'', w'')
        x, skips = self.way_down(self.conv_in(x), emb, cond)
        x = self.with_additions(self.mid_block(x, emb, context, mask), cond)  # (B, channels[-1], h', w')
        skips = with_residuals(skips, cond)
        for level in self.up_blocks:
            for i in range(self.config.blocks + 1):
                x = torch.cat([x, skips.pop()], dim=1)  # (B, channels of both, h', w')
                x = level.block(i, x, emb, context, mask)  # (B, channels[level], h', w')
            if level.upsamplers is not None:
                h, w = skips[-1].shape[-2:]
                x = level.upsample(x, emb, (h, w))  # (B, channels[level], 2h', 2w')
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def with_additions(self, x: Tensor, cond: Cond) -> Tensor:
        """Return the middle's output (B, channels[-1], h', w') with what controls add to it."""
        if cond.features is not None and len(cond.features) > len(self.config.channels):
            x = x + cond.features[-1]
        return x if cond.residuals is None else x + cond.residuals[-1]


def with_residuals(skips: list[Tensor], cond: Cond) -> list[Tensor]:
    """Return the maps that the way up reads, or the first of them, with the residuals of ControlNets."""
    if cond.residuals is None:
        return skips
    return [skip + added for skip, added in zip(skips, cond.residuals, strict=False)]
