"""Training the autoencoder: reconstruction and a small KL term (Rombach et al. 2022, section 3.1), without a
discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.compose import Composition
from ldm.models.vae import AutoencoderKL, VAEConfig, psnr
from ldm.training.config import DataConfig, RunConfig, at_least
from ldm.training.data import Pictures, picture_grid, to_uint8
from ldm.training.loop import Draws
from ldm.weights.formats.ldm_folder import write_part


@dataclass(frozen=True, kw_only=True)
class VAELoss:
    """Weights: l1 · mean|x − y| + mse · mean(x − y)² + kl · KL / (numbers in a picture)."""

    l1: float = 1.0
    mse: float = 1.0
    kl: float = 1e-3

    def __post_init__(self) -> None:
        at_least(0, l1=self.l1, mse=self.mse, kl=self.kl)


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """The configuration of an autoencoder's training."""

    run: RunConfig
    data: DataConfig
    model: VAEConfig
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
        self.pictures = Pictures(config.data)
        torch.manual_seed(config.run.seed)
        self.model = AutoencoderKL(config.model).to(device)

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.pictures.tensor(self.pictures.draw(draws.rng, batch)).to(self.device)  # (B, 3, H, W)
        latent = self.config.data.size // self.config.model.factor
        noise = draws.normal(batch, self.config.model.latent_channels, latent, latent).to(self.device)
        y, posterior = self.model(x, noise)
        error, weights = y.float() - x, self.config.loss
        l1, mse, kl = error.abs().mean(), error.square().mean(), posterior.kl().mean() / x[0].numel()
        return weights.l1 * l1 + weights.mse * mse + weights.kl * kl, {"l1": l1, "mse": mse, "kl": kl}

    def validate(self) -> dict[str, float]:
        """Mean PSNR over 128 held-out pictures (half on a ground), and the latents' spread: of the means over
        the pictures, and of one posterior."""
        x = self.pictures.tensor(held_out_compositions(self.pictures, 128)).to(self.device)
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
        x = self.pictures.tensor(held_out_compositions(self.pictures, 16)).to(self.device)
        y = self.model.decode(self.model.encode(x).mode())
        return picture_grid(to_uint8(torch.stack([x, y], 1).flatten(0, 1)), columns=8)

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        from ldm.training.latents import measure_scale

        scale = round(measure_scale(self.model, self.pictures), 5)
        write_part(
            folder,
            "vae",
            self.model,
            self.config.model,
            latent_scale=scale,
            figures=self.validate(),
            training=record,
        )


def held_out_compositions(pictures: Pictures, n: int) -> list[Composition]:
    """n held-out pictures, drawn with a fixed seed, every second one on a random ground."""
    rng = np.random.default_rng(20)
    rows = rng.permutation(pictures.data.held_out)[:n]
    grounds = rng.choice(list(pictures.palette), size=len(rows))
    return [
        Composition(image=int(row), background=str(ground) if i % 2 else None)
        for i, (row, ground) in enumerate(zip(rows, grounds, strict=True))
    ]
