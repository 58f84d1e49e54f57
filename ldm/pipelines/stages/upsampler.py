"""The upsamplers of unCLIP: small images → large ones (Ramesh et al. 2022, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.catalog.unclip_cards import StageCard
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import switch
from ldm.diffusion.interfaces import DenoiseFn
from ldm.pipelines.call import Call
from ldm.pipelines.stages.space import Space
from ldm.pipelines.stages.stage import UPSAMPLE, Stage
from ldm.pipelines.windows import tiled


class UpsamplerStage(nn.Module):
    """Small images → large ones, by a network that is given the small image, enlarged.

    Args:
        net: The network.
        card: How it is sampled.
        index: Position among the upsamplers.
        last: Another network for the last step.
    """

    options = ("steps", "guidance", "sampler", "latents", "height", "width")

    def __init__(
        self, net: nn.Module, card: StageCard, *, index: int = 0, last: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.card, self.index = card, index
        self.denoiser = card.make_denoiser(net)
        self.last = None if last is None else card.make_denoiser(last)

    @property
    def stage(self) -> Stage:
        """The diffusion of large images, in pixels."""
        return Stage(
            denoiser=self.denoiser,
            card=self.card,
            space=Space(),
            name="upsampler",
            number=UPSAMPLE + self.index,
            label="upsampler",
        )

    def settle(self, prompt: Any, **options: Any) -> Call:
        """Settle the options of a call; see `ldm.pipelines.call.settle`."""
        call = self.stage.settle(prompt, **options)
        self.stage.check_shape(call)
        return call

    @torch.no_grad()
    def forward(self, small: Tensor, call: Call, *, tile: int | None = None) -> Tensor:
        """Enlarge images.

        Args:
            small: Images (B, 3, h, w) in [0, 1].
            call: The call, of the large images' size.
            tile: Side in pixels of what the network sees at a time; see `ldm.pipelines.windows.tiled`.

        Returns:
            Images (B, 3, H, W) in [0, 1], float32 on the CPU.
        """
        stage, size = self.stage, (call.height, call.width)
        low = enlarge(2 * small.to(stage.device).float() - 1, size)  # (B, 3, H, W)
        cond = Cond(concat=low)

        def bound(denoiser: Denoiser) -> DenoiseFn:
            if tile is not None and tile < max(size):
                return tiled(denoiser, cond, tile, overlap=tile // 4)
            return denoiser.bind(cond)

        fn = bound(self.denoiser)
        if self.last is not None:
            t = call.grid.t
            below = float(t[-2] + t[-1]) / 2 if len(t) > 1 else float(t[-1]) + 1
            fn = switch(fn, bound(self.last), below)
        call, x = stage.begin(call, shape=(3, *size))
        x = stage.solve(call, stage.clamped(fn), x)
        if self.card.residual is not None:
            x = low + self.card.residual * x
        return ((x + 1) / 2).clamp(0, 1).cpu()


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize images (B, 3, h, w) to `size` (H, W) as upsamplers are trained: bicubic, antialiased."""
    return F.interpolate(x, tuple(size), mode="bicubic", align_corners=False, antialias=True)
