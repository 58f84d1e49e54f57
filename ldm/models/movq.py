"""MoVQ, the autoencoder of Kandinsky (Zheng et al. 2022): a VQ model whose latent modulates every norm of its
decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ldm.models.vae import VAEDecoder
from ldm.models.vq import VQConfig, VQModel


@dataclass(frozen=True, kw_only=True)
class MoVQConfig(VQConfig):
    """The shape of a MoVQ; see `VQConfig`."""


class MoVQ(VQModel):
    """Pictures in [−1, 1] to latents and back. Kandinsky decodes its latents as they are, without taking them
    to their nearest codes."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__(config)
        self.decoder = VAEDecoder(config, spatial=config.latent_channels)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), not quantised → pictures (B, 3, f·h, f·w), about [−1, 1]."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z), z), self.config.patch)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """The indices of codes (B, h, w) → pictures (B, 3, f·h, f·w), about [−1, 1]."""
        return self.decode(self.quantize.vectors(indices))
