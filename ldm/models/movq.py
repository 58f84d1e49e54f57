"""MoVQ, the autoencoder of Kandinsky (Zheng et al. 2022).

It is a vector-quantized autoencoder whose latent modulates every norm of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ldm.models.vae import VAEDecoder
from ldm.models.vq import VQConfig, VQModel


@dataclass(frozen=True, kw_only=True)
class MoVQConfig(VQConfig):
    """Shape of a MoVQ; the arguments are those of `VQConfig`."""


class MoVQ(VQModel):
    """Autoencoder of images in [−1, 1]; Kandinsky decodes its latents without quantization."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__(config)
        self.decoder = VAEDecoder(config, spatial=config.latent_channels)

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of latents z (B, C, h, w), not quantized."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z), z), self.config.patch)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of the indices of codes (B, h, w)."""
        return self.decode(self.quantize.vectors(indices))
