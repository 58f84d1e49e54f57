"""The detokenizer of DALL·E Mini: the decoder of a VQGAN (Esser et al. 2021) without its encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm.models.posterior import Point
from ldm.models.vq import VQConfig, VQModel


@dataclass(frozen=True, kw_only=True)
class DetokenizerConfig(VQConfig):
    """Shape of a detokenizer; the arguments are those of `VQConfig`."""


class Detokenizer(VQModel):
    """Codebook and decoder of a vector-quantized autoencoder: tokens → images."""

    def __init__(self, config: DetokenizerConfig) -> None:
        super().__init__(config)
        del self.encoder, self.quant_conv

    def encode(self, x: Tensor) -> Point:
        """Raise ValueError: there is no encoder."""
        raise ValueError("a detokenizer has no encoder: load the whole autoencoder to read images")
