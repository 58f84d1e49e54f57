"""Training of a vector-quantized autoencoder of patches: reconstruction of images from their codes.

The encoder and the codebook are fitted to random scenes and frozen (see `PatchVQ`); the decoder is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.models.patch_vq import PatchVQ, PatchVQConfig
from ldm.models.vae import psnr
from ldm.training.config import RunConfig, check_at_least
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.parts.vae import VAELoss, reconstruction_errors
from ldm.weights.formats.ldm_folder import write_part


@dataclass(frozen=True, kw_only=True)
class VQTraining:
    """The configuration of the training of a vector-quantized autoencoder.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        model: Shape of the autoencoder.
        loss: Weights of the errors; `kl` must be 0.
        fitted: Number of random scenes that the encoder and the codebook are fitted to. Default: 1024.
    """

    run: RunConfig
    data: DataSection
    model: PatchVQConfig
    loss: VAELoss
    fitted: int = 1024

    def __post_init__(self) -> None:
        check_at_least(1, fitted=self.fitted)
        if self.data.size % self.model.factor:
            raise ValueError(
                f"data.size {self.data.size}: expected a multiple of the autoencoder's factor"
                f" {self.model.factor}"
            )
        if self.loss.kl:
            raise ValueError(f"loss.kl {self.loss.kl}: expected 0, as codes have no distribution")


class VQPart:
    """A vector-quantized autoencoder in training."""

    def __init__(self, config: VQTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run, validates_held_out=True)
        torch.manual_seed(config.run.seed)
        model = PatchVQ(config.model)
        scenes = self.images.draw(Draws(config.run.seed, range(config.fitted), stream=1))
        model.fit(self.images.tensor(scenes), seed=config.run.seed)
        for fitted in (model.project, model.quantize):
            fitted.requires_grad_(False)
        self.model = model.to(device)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the indices (B, h, w) of the codes of images (B, 3, H, W), computed in float32."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.indices(self.model.encode(x).mode())

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted reconstruction losses of a random batch, and each of them to log."""
        x = self.images.tensor(self.images.draw(draws)).to(self.device)  # (B, 3, H, W)
        figures = reconstruction_errors(x, self.model.decode_indices(self.encode(x)), draws)
        return self.config.loss.total(figures), figures

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.images.draw(draws))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return figures over 128 held-out images, half of them on a background.

        The mean PSNR in dB, and the perplexity of the codes, which is K if all are used equally often.
        """
        x = self.images.tensor(self.images.held_out(128)).to(self.device)
        indices = self.encode(x)
        y = torch.cat([self.model.decode_indices(part) for part in indices.split(16)])
        p = torch.bincount(indices.flatten(), minlength=self.config.model.codes) / indices.numel()
        entropy = -(p * p.clamp_min(1e-12).log()).sum()
        return {"psnr": float(psnr(x, y).mean()), "perplexity": float(entropy.exp())}

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Show held-out images, each with its reconstruction."""
        x = self.images.tensor(self.images.held_out(16)).to(self.device)
        return comparison_grid(x, self.model.decode_indices(self.encode(x)), columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the autoencoder."""
        write_part(folder, "vae", self.model, self.config.model, figures=self.validate(), training=record)
