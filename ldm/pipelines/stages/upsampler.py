"""The stage that enlarges images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.catalog.unclip_cards import StageCard
from ldm.diffusion.cond import Cond
from ldm.diffusion.guidance import switch
from ldm.diffusion.interfaces import DenoiseFn
from ldm.pipelines.call import Call
from ldm.pipelines.stages.stage import UPSAMPLE, Stage, make_denoiser
from ldm.pipelines.windows import tiled


class UpsamplerStage(Stage):
    """Small pictures → large ones, by a network that is given the enlarged small one; ``last``: another
    network for the last step."""

    def __init__(
        self, net: nn.Module, card: StageCard, *, index: int = 0, last: nn.Module | None = None
    ) -> None:
        super().__init__(net, card, number=UPSAMPLE + index, label="upsampler")
        self.last = None if last is None else make_denoiser(last, card)

    @torch.no_grad()
    def forward(self, small: Tensor, call: Call, *, tile: int | None = None) -> Tensor:
        """Pictures (B, 3, h, w) in [0, 1] → (B, 3, H, W) of the call's size in [0, 1]; ``tile``: see
        `ldm.pipelines.windows.tiled`."""
        size = (call.height, call.width)
        low = enlarge(2 * small.to(self.device).float() - 1, size)
        cond = Cond(concat=low)

        def bound(denoiser: Any) -> DenoiseFn:
            return (
                tiled(denoiser, cond, tile, overlap=tile // 4)
                if tile is not None and tile < max(size)
                else denoiser.bind(cond)
            )

        fn = bound(self.denoiser)
        if self.last is not None:
            t = call.grid.t
            fn = switch(fn, bound(self.last), float(t[-2] + t[-1]) / 2 if len(t) > 1 else float(t[-1]) + 1)
        x = self.run(self.clamped(fn), self.start(call, (3, *size)), call)
        if self.card.residual is not None:
            x = low + self.card.residual * x
        return ((x + 1) / 2).clamp(0, 1).cpu()


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures resized as upsamplers were trained: bicubic, antialiased."""
    return F.interpolate(x, tuple(size), mode="bicubic", align_corners=False, antialias=True)
