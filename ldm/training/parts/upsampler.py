"""Training of an upsampler: crops of images conditioned on their degraded small versions.

Ramesh et al. 2022, section 2.1; Saharia et al. 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
from ldm.training.config import RunConfig, check_at_least
from ldm.training.degradation import Degradation
from ldm.training.diffusion import DiffusionConfig, zero_outputs
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.losses.common import draw_diffusion_loss
from ldm.weights.formats.ldm_folder import write_part


@dataclass(frozen=True, kw_only=True)
class UpsamplerTraining:
    """The configuration of an upsampler's training.

    Args:
        run: Length, batches and optimizer.
        data: The training images, of the large size.
        model: Shape of the UNet: 6 channels in, 3 out, and no context.
        diffusion: Schedule, prediction and timesteps.
        factor: How many times larger the output is, at least 2. Default: 2.
        crop: Side of the crops in pixels of the large image. Default: 64.
        residual: If given, the network learns the difference to the enlarged small image, divided by this
            number (about the difference's standard deviation); None for the image itself. Default: None.
        degradation: How the small images are degraded.
    """

    run: RunConfig
    data: DataSection
    model: UNetConfig
    diffusion: DiffusionConfig
    factor: int = 2
    crop: int = 64
    residual: float | None = None
    degradation: Degradation = field(default_factory=Degradation)

    def __post_init__(self) -> None:
        check_at_least(2, factor=self.factor)
        if self.residual is not None and not self.residual > 0:
            raise ValueError(f"residual: expected a positive number or None, got {self.residual}")
        if self.model.in_channels != 6 or self.model.out_channels != 3 or self.model.takes_context:
            raise ValueError(
                "model: expected 6 channels in (the noisy and the enlarged image), 3 out, and no context"
            )
        if (
            self.data.size % self.factor
            or not self.factor <= self.crop <= self.data.size
            or self.crop % self.model.factor
        ):
            raise ValueError(
                f"crop {self.crop}: expected a multiple of {self.model.factor} up to data.size"
                f" {self.data.size}, which must be a multiple of factor {self.factor}"
            )


class UpsamplerPart:
    """An upsampler in training."""

    def __init__(self, config: UpsamplerTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run, validates_held_out=True)
        torch.manual_seed(config.run.seed)
        net = UNet(config.model)
        zero_outputs(net)
        self.denoiser = Denoiser(net.to(device), config.diffusion.make(), config.diffusion.prediction)
        self.model = nn.ModuleDict({"net": net})

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce images (B, 3, H, W) to (B, 3, H/f, W/f) by means over boxes."""
        return F.avg_pool2d(x, self.config.factor)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the diffusion loss of a random batch of crops."""
        c = self.config
        x = self.images.tensor(self.images.draw(draws))  # (B, 3, H, W)
        with torch.autocast(x.device.type, enabled=False):  # data preparation stays in float32
            low = self.reduce(x)  # (B, 3, H/f, W/f)
            low = c.degradation(low, draws)
            low = enlarge(low, x.shape[-2:])  # (B, 3, H, W)
        most = [side - c.crop + 1 for side in x.shape[-2:]]
        corners = [rng.integers(0, most) for rng in draws.rngs]
        both = torch.cat([x, low], dim=1)
        both = torch.stack(
            [part[:, i : i + c.crop, j : j + c.crop] for part, (i, j) in zip(both, corners, strict=True)]
        )  # (B, 6, crop, crop)
        x0, low = both.to(self.device).chunk(2, dim=1)
        if c.residual is not None:
            x0 = (x0 - low) / c.residual
        return draw_diffusion_loss(self.denoiser, c.diffusion, x0, Cond(concat=low), draws).weighted, {}

    def enlarged(self, small: Tensor, *, steps: int = 5, seed: int = 0) -> Tensor:
        """Upsample images (B, 3, h, w) in [−1, 1] to (B, 3, f·h, f·w)."""
        size = [side * self.config.factor for side in small.shape[-2:]]
        low = enlarge(small.to(self.device), size)
        x = initial_noise(range(seed, seed + len(small)), (3, *size)).to(self.device)
        grid = TimeGrid.make(self.denoiser.schedule, steps, spacing="trailing")
        x = ddim(self.denoiser.bind(Cond(concat=low)), x, grid)
        return (x if self.config.residual is None else low + self.config.residual * x).clamp(-1, 1)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.images.draw(draws))

    def validate(self) -> dict[str, float]:
        """Return the mean PSNR in dB of 64 held-out images upsampled, and of bicubic enlargement."""
        x = self.images.tensor(self.images.held_out(64))
        low = self.reduce(x)
        made = torch.cat([self.enlarged(part).cpu() for part in low.split(16)])
        return {
            "psnr": float(psnr(x, made).mean()),
            "bicubic_psnr": float(psnr(x, enlarge(low, x.shape[-2:]).clamp(-1, 1)).mean()),
        }

    def preview(self) -> np.ndarray:
        """Show held-out images enlarged bicubically and by the network, and the originals."""
        x = self.images.tensor(self.images.held_out(8))
        low = self.reduce(x)
        return comparison_grid(enlarge(low, x.shape[-2:]), self.enlarged(low), x, columns=6)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the upsampler, with its factor and residual scale."""
        write_part(
            folder,
            "upsampler",
            self.denoiser.net,
            self.config.model,
            factor=self.config.factor,
            residual=self.config.residual,
            diffusion=self.config.diffusion,
            figures=self.validate(),
            training=record,
        )
