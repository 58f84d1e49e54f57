"""Fine-tuning of the decoder of a loaded model's autoencoder: reconstruction from its own latents.

The encoder stays, and with it the space in which the model diffuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.models.vae import AutoencoderKL, psnr
from ldm.pipelines.latent import LatentDiffusion
from ldm.registry.saving import save
from ldm.training.config import RunConfig
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import TrainingImages
from ldm.training.parts.vae import VAELoss, reconstruction_errors
from ldm.training.recomputing import recompute_blocks
from ldm.training.tuning.base_model import check_base, fine_tuned, load_base, network_hashes

FIXED_IMAGES = 64  # of a validation


@dataclass(frozen=True, kw_only=True)
class DecoderFineTuning:
    """The configuration of a decoder's fine-tuning.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        base: Name of the model (see `ldm.list_models`); None for that of the folder `weights`.
        weights: Its weights, as `ldm.load` takes them; None for the model's own. Default: None.
        loss: Weights of the loss; its `kl` is not read, as the encoder stays.
        recompute: See `FineTuning`. Default: False.
    """

    run: RunConfig
    data: DataSection
    base: str | None = None
    weights: str | None = None
    loss: VAELoss = field(default_factory=VAELoss)
    recompute: bool = False

    def __post_init__(self) -> None:
        check_base(self.base, self.weights)


class Decoding:
    """The decoder of a model's autoencoder in training; the encoder stays.

    Args:
        pipe: The model.
        images: The training images.
        loss: Weights of the loss.

    Attributes:
        trained: The modules that decode.

    Raises:
        ValueError: If the autoencoder is no `AutoencoderKL`.
    """

    def __init__(self, pipe: LatentDiffusion, images: TrainingImages, loss: VAELoss) -> None:
        vae = pipe.vae
        if not isinstance(vae, AutoencoderKL):
            raise ValueError(f"{pipe.name!r} has a {type(vae).__name__}, expected an AutoencoderKL")
        self.vae, self.images, self.loss = vae, images, loss
        self.trained = nn.ModuleDict(
            {name: part for name, part in vae.named_children() if name in ("decoder", "post_quant_conv")}
        )

    def loss_of(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted reconstruction losses of a random batch, and each of them to log."""
        x = self._moved(self.images.tensor(self.images.draw(draws)))  # (B, 3, H, W)
        with torch.no_grad():
            posterior = self.vae.encode(x)
        z = posterior.sample(draws.normal(*posterior.mean.shape).to(x.device))
        figures = reconstruction_errors(x, self.vae.decode(z), draws)
        return self.loss.total(figures), figures

    def shown(self, n: int) -> Tensor:
        """Return at most n held-out images, or training images, (n, 3, H, W) in [−1, 1]."""
        return self._moved(self.images.tensor(self.images.held_out(n) or self.images.plain(n, seed=7)))

    def reconstructed(self, x: Tensor) -> Tensor:
        """Return images (B, 3, H, W) decoded from the means of their latents."""
        return torch.cat([self.vae.decode(self.vae.encode(part).mode()) for part in x.split(8)])

    def validate(self) -> dict[str, float]:
        """Return the mean PSNR in dB of the reconstructions of fixed images."""
        x = self.shown(FIXED_IMAGES)
        return {"psnr": float(psnr(x, self.reconstructed(x)).mean())}

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(next(self.vae.parameters()).device)


class FineTuneDecoderPart:
    """The decoder of a loaded model in training."""

    def __init__(self, config: DecoderFineTuning, device: torch.device) -> None:
        self.config, self.device = config, device
        loaded = load_base(config.base, config.weights)
        self.pipe = fine_tuned(loaded, loaded.card).to(device)
        self.base_hashes = network_hashes(self.pipe.networks())
        self.pipe.requires_grad_(False)
        self.images = open_images(config.data, config.run)
        self.decoding = Decoding(self.pipe, self.images, config.loss)
        self.model = self.decoding.trained.requires_grad_(True)
        if config.recompute:
            recompute_blocks(self.model)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted reconstruction losses of a random batch, and each of them to log."""
        return self.decoding.loss_of(draws)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.images.draw(draws))

    def validate(self) -> dict[str, float]:
        """Return the mean PSNR in dB of the reconstructions of held-out images, or of training images."""
        return self.decoding.validate()

    def preview(self) -> np.ndarray:
        """Show images, each with its reconstruction."""
        x = self.decoding.shown(16)
        return comparison_grid(x, self.decoding.reconstructed(x), columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the whole model, with half precision."""
        save(self.pipe, folder, dtype="float16", training=record, figures=self.validate())
