"""The latent space in training: a frozen autoencoder, and the latents of all cached samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.draft import DraftConfig
from ldm.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from ldm.models.posterior import Posterior
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.pipelines.stages.space import Space
from ldm.training.draws import Draws
from ldm.training.inputs.protocol import CachedSamples, Rows, Samples, TrainingImages
from ldm.weights.formats.ldm_folder import read_network, read_part_config


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """A frozen autoencoder and the cached latents of a run.

    Args:
        vae: The autoencoder.
        space: Scales its latents to unit variance.
        images: The training images.
        moments: Means and standard deviations of the posteriors, (N, 2, C, h, w) float16, memory-mapped, a
            row for each cached sample.
        device: Where latents are returned.
    """

    vae: Any  # an autoencoder of any kind: encode, decode, config
    space: Space
    images: TrainingImages
    moments: Rows
    device: torch.device

    @classmethod
    def open(cls, folder: str | Path, samples: CachedSamples, device: torch.device) -> LatentSpace:
        """Read the autoencoder in a folder; encode the cached samples unless that was done before."""
        network, about = read_network(folder, "vae")
        if not isinstance(network, AutoencoderKL | PatchAutoencoder):
            raise ValueError(
                f"the autoencoder in {str(folder)!r} is a {type(network).__name__}: expected AutoencoderKL or"
                " PatchAutoencoder"
            )
        if about.get("latent_scale") is None:
            raise ValueError(f"vae.yaml in {str(folder)!r} states no latent_scale, which training needs")
        space = Space(network, float(about["latent_scale"]))
        return cls.of(space, about["sha256"], samples, device)

    @classmethod
    def of(cls, space: Space, key: str, samples: CachedSamples, device: torch.device) -> LatentSpace:
        """Encode the cached samples unless that was done before.

        Args:
            space: The autoencoder, with the scale of its latents.
            key: Identifies its weights.
            samples: The cached samples of the run.
            device: Where to encode, and where latents are returned.
        """
        vae, images = space.vae.to(device), samples.images

        def encode(part: Samples) -> Tensor:
            found = vae.encode(images.tensor(part).to(device))
            std = (0.5 * found.logvar).exp() if isinstance(found, Posterior) else torch.zeros_like(found.mean)
            return torch.stack([found.mean, std], 1)

        moments = samples.cached("latents", key, (2, *latent_shape(vae.config, images)), encode)
        return cls(vae=vae, space=space, images=images, moments=moments, device=device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of a latent."""
        return latent_shape(self.vae.config, self.images)

    def sample(self, rows: Sequence[int], draws: Draws) -> Tensor:
        """Sample the posteriors of cached samples: scaled latents (B, C, h, w) float32."""
        moments = torch.from_numpy(self.moments[np.asarray(rows)]).float()  # (B, 2, C, h, w)
        z = moments[:, 0] + moments[:, 1] * draws.normal(*moments[:, 0].shape)
        return self.space.scaled(z).to(self.device)

    def encode(self, samples: Samples) -> Tensor:
        """Encode samples to the scaled means of their posteriors, (B, C, h, w)."""
        parts = self.images.tensor(samples).to(self.device).split(32)
        return self.space.scaled(torch.cat([self.vae.encode(x).mode() for x in parts]))

    def decode(self, z: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W) in about [−1, 1]."""
        images: Tensor = self.vae.decode(self.space.unscaled(z))
        return images


def latent_shape(vae: Any, images: TrainingImages) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latent of a training image, of an autoencoder's configuration."""
    side = images.size // vae.factor
    return vae.latent_channels, side, side


def read_latent_shape(folder: str | Path, images: TrainingImages) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of a latent of the autoencoder in a folder, without reading its weights."""
    config = read_part_config(folder, "vae")
    assert isinstance(config, VAEConfig | PatchAutoencoderConfig)
    return latent_shape(config, images)


def check_draft_shape(draft: DraftConfig, latent: tuple[int, int, int]) -> None:
    """Raise ValueError unless a draft has the shape (C, h, w) of a latent."""
    channels, size, _ = latent
    if (draft.channels, draft.size) != (channels, size):
        raise ValueError(
            f"model: expected {channels} channels of size {size}, the shape of a latent, got"
            f" {draft.channels} of size {draft.size}"
        )


@torch.no_grad()
def measure_scale(
    vae: AutoencoderKL | PatchAutoencoder, images: TrainingImages, seed: int = 0, n: int = 2048
) -> float:
    """Measure the factor that gives latents unit variance (Rombach et al. 2022, appendix G).

    Args:
        vae: The autoencoder.
        images: The training images.
        seed: Seed of the samples and of the posteriors' noise. Default: 0.
        n: Number of samples. Default: 2048.

    Returns:
        1 / the standard deviation of sampled latents.
    """
    device = next(vae.parameters()).device
    total, square, count = 0.0, 0.0, 0
    for start in range(0, n, 32):
        draws = Draws(seed, range(start, min(start + 32, n)))
        posterior = vae.encode(images.tensor(images.draw(draws)).to(device))
        z = posterior.sample(draws.normal(*posterior.mean.shape).to(device)).double()
        total, square, count = total + float(z.sum()), square + float(z.square().sum()), count + z.numel()
    return float((square / count - (total / count) ** 2) ** -0.5)
