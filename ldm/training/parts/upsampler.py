"""Training an upsampler: crops of pictures under their corrupted small ones (Ramesh et al. 2022, section 2.1;
Saharia et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.noise import initial_noise
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import psnr
from ldm.pipelines.stages.upsampler import enlarge
from ldm.samplers.ode.ddim import ddim
from ldm.training.config import DataConfig, RunConfig, at_least
from ldm.training.data import Pictures, picture_grid, to_uint8
from ldm.training.degrade import Degradation
from ldm.training.loop import Draws
from ldm.training.losses import diffusion_loss
from ldm.training.parts.latent_diffusion import Diffusion, zero_outputs
from ldm.training.parts.vae import held_out_compositions
from ldm.weights.formats.ldm_folder import write_part


@dataclass(frozen=True, kw_only=True)
class UpsamplerTraining:
    """The configuration of an upsampler's training: crops of pictures of ``data.size``, each ``factor`` times
    larger than what is given.

    ``residual``: what is learnt is the difference to the enlarged small picture, in units of this deviation
    (about its own); None for the picture.
    """

    run: RunConfig
    data: DataConfig
    model: UNetConfig
    diffusion: Diffusion
    factor: int = 2
    crop: int = 64
    residual: float | None = None
    degradation: Degradation = field(default_factory=Degradation)

    def __post_init__(self) -> None:
        at_least(2, factor=self.factor)
        if self.residual is not None and not self.residual > 0:
            raise ValueError(f"residual: expected a positive number or None, got {self.residual}")
        if self.model.in_channels != 6 or self.model.out_channels != 3 or self.model.takes_context:
            raise ValueError(
                "model: an upsampler takes picture and enlarged picture, 6 channels to 3, and no context"
            )
        if (
            self.data.size % self.factor
            or not self.factor <= self.crop <= self.data.size
            or self.crop % self.model.factor
        ):
            most = f"up to data.size {self.data.size}, which is one of factor {self.factor}"
            raise ValueError(f"crop {self.crop}: expected a multiple of {self.model.factor}, {most}")


class UpsamplerPart:
    """An upsampler in training."""

    def __init__(self, config: UpsamplerTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pictures = Pictures(config.data)
        torch.manual_seed(config.run.seed)
        net = UNet(config.model)
        zero_outputs(net)
        self.denoiser = Denoiser(net.to(device), config.diffusion.make(), config.diffusion.prediction)
        self.model: nn.Module = nn.ModuleDict({"net": net})

    def small(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) at the small size: means over what one pixel becomes."""
        return F.avg_pool2d(x, self.config.factor)

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        x = self.pictures.tensor(self.pictures.draw(draws.rng, batch))  # (B, 3, H, W)
        with torch.autocast(x.device.type, enabled=False):  # the data, which is no part of the network
            low = self.small(x)
            low = enlarge(c.degradation(low, draws.rng, draws.normal(*low.shape)), x.shape[-2:])
        corners = draws.rng.integers(0, c.data.size - c.crop + 1, size=(batch, 2))
        both = torch.cat([x, low], dim=1)
        both = torch.stack(
            [part[:, i : i + c.crop, j : j + c.crop] for part, (i, j) in zip(both, corners, strict=True)]
        )
        x0, low = both.to(self.device).chunk(2, dim=1)
        if c.residual is not None:
            x0 = (x0 - low) / c.residual
        t = c.diffusion.draw(batch, draws.torch).to(self.device)
        losses = diffusion_loss(
            self.denoiser, x0, Cond(concat=low), t, draws.normal(*x0.shape).to(self.device)
        )
        return (c.diffusion.weight(self.denoiser.schedule.snr(t)).to(losses) * losses).mean(), {}

    def enlarged(self, small: Tensor, *, steps: int = 5, seed: int = 0) -> Tensor:
        """Small pictures (B, 3, h, w) in [−1, 1] → (B, 3, f·h, f·w)."""
        size = [side * self.config.factor for side in small.shape[-2:]]
        low = enlarge(small.to(self.device), size)
        x = initial_noise(range(seed, seed + len(small)), (3, *size)).to(self.device)
        x = ddim(
            self.denoiser.bind(Cond(concat=low)),
            x,
            TimeGrid.make(self.denoiser.schedule, steps, spacing="trailing"),
        )
        return (x if self.config.residual is None else low + self.config.residual * x).clamp(-1, 1)

    def validate(self) -> dict[str, float]:
        """Mean PSNR over 64 pictures that training never sees, made from clean small ones; and that of
        bicubic enlargement."""
        x = self.pictures.tensor(held_out_compositions(self.pictures, 64))
        low = self.small(x)
        made = torch.cat([self.enlarged(part).cpu() for part in low.split(16)])
        return {
            "psnr": float(psnr(x, made).mean()),
            "bicubic_psnr": float(psnr(x, enlarge(low, x.shape[-2:]).clamp(-1, 1)).mean()),
        }

    def preview(self) -> np.ndarray:
        """Rows of small pictures enlarged bicubically, by the network, and the truth."""
        x = self.pictures.tensor(held_out_compositions(self.pictures, 8))
        low = self.small(x)
        return picture_grid(
            to_uint8(torch.stack([enlarge(low, x.shape[-2:]), self.enlarged(low).cpu(), x], 1).flatten(0, 1)),
            columns=6,
        )

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        c = self.config
        facts = {
            "factor": c.factor,
            "residual": c.residual,
            "diffusion": c.diffusion,
            "figures": self.validate(),
            "training": record,
        }
        write_part(folder, "upsampler", self.denoiser.net, c.model, **facts)
