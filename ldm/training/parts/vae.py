"""Training of the autoencoder: reconstruction and a small KL term, without a discriminator.

Rombach et al. 2022, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from ldm.models.vae import AutoencoderKL, VAEConfig, psnr
from ldm.training.caches.latents import measure_scale
from ldm.training.config import RunConfig, check_at_least
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.opening import DataSection, open_images
from ldm.weights.formats.ldm_folder import write_part

FITTED = 1024
"""The number of random scenes that the projection of a `PatchAutoencoder` is fitted to."""


@dataclass(frozen=True, kw_only=True)
class VAELoss:
    """Weights of the loss l1 · mean|x − y| + mse · mean(x − y)² + edge · E + kl · KL / (numbers per image).

    E is the mean absolute error of the differences between neighbouring pixels, across plus down.
    """

    l1: float = 1.0
    mse: float = 1.0
    edge: float = 0.0
    kl: float = 1e-3

    def __post_init__(self) -> None:
        check_at_least(0, l1=self.l1, mse=self.mse, edge=self.edge, kl=self.kl)
        if not self.l1 + self.mse + self.edge > 0:
            raise ValueError("expected a positive weight of l1, mse or edge")

    def total(self, figures: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of errors by name, ()."""
        return torch.stack([getattr(self, name) * value for name, value in figures.items()]).sum()


def reconstruction_errors(x: Tensor, y: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Return the mean errors of reconstructions y of images x, each (B, 3, H, W), by names in `VAELoss`."""
    error = y.float() - x
    return {
        "l1": draws.mean(error.abs()),
        "mse": draws.mean(error.square()),
        "edge": draws.mean(error.diff(dim=-1).abs()) + draws.mean(error.diff(dim=-2).abs()),
    }


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """The configuration of an autoencoder's training."""

    run: RunConfig
    data: DataSection
    model: VAEConfig | PatchAutoencoderConfig
    loss: VAELoss


class VAEPart:
    """An autoencoder in training."""

    def __init__(self, config: VAETraining, device: torch.device) -> None:
        self.config, self.device = config, device
        if config.data.size % config.model.factor:
            raise ValueError(
                f"data.size {config.data.size}: expected a multiple of the autoencoder's factor"
                f" {config.model.factor}"
            )
        self.images = open_images(config.data, config.run, validates_held_out=True)
        torch.manual_seed(config.run.seed)
        self.model = self.make(config.model).to(device)

    def make(self, config: VAEConfig | PatchAutoencoderConfig) -> AutoencoderKL | PatchAutoencoder:
        """Return a new autoencoder; the projection of a `PatchAutoencoder` is fitted and frozen."""
        if isinstance(config, VAEConfig):
            return AutoencoderKL(config)
        model = PatchAutoencoder(config)
        model.fit(self.images.tensor(self.images.draw(Draws(self.config.run.seed, range(FITTED), stream=1))))
        model.project.requires_grad_(False)
        return model

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted reconstruction and KL losses of a random batch, and each of them to log."""
        x = self.images.tensor(self.images.draw(draws)).to(self.device)  # (B, 3, H, W)
        h, w = (side // self.config.model.factor for side in x.shape[-2:])
        noise = draws.normal(len(x), self.config.model.latent_channels, h, w).to(self.device)
        y, posterior = self.model(x, noise)
        figures = reconstruction_errors(x, y, draws) | {"kl": draws.mean(posterior.kl()) / x[0].numel()}
        return self.config.loss.total(figures), figures

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.images.draw(draws))

    def validate(self) -> dict[str, float]:
        """Return figures over 128 held-out images, half of them on a background.

        The mean PSNR in dB, the standard deviation of the latents' means over the images, and the mean
        standard deviation of a posterior.
        """
        x = self.images.tensor(self.images.held_out(128)).to(self.device)
        posteriors = [self.model.encode(part) for part in x.split(16)]
        y = torch.cat([self.model.decode(p.mode()) for p in posteriors])
        means = torch.cat([p.mean for p in posteriors])
        noise = torch.cat([p.logvar for p in posteriors]).mul(0.5).exp()
        return {
            "psnr": float(psnr(x, y).mean()),
            "latent_std": float(means.std()),
            "posterior_std": float(noise.mean()),
        }

    def preview(self) -> np.ndarray:
        """Show held-out images, each with its reconstruction."""
        x = self.images.tensor(self.images.held_out(16)).to(self.device)
        return comparison_grid(x, self.model.decode(self.model.encode(x).mode()), columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the autoencoder, with the factor that gives its latents unit variance."""
        scale = round(measure_scale(self.model, self.images), 5)
        write_part(
            folder,
            "vae",
            self.model,
            self.config.model,
            latent_scale=scale,
            figures=self.validate(),
            training=record,
        )
