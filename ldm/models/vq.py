"""The vector-quantised autoencoder of latent diffusion (van den Oord et al. 2017; Esser et al. 2021; Rombach
et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.vae import Point, VAEConfig, VAEDecoder, VAEEncoder, check_size


@dataclass(frozen=True, kw_only=True)
class VQConfig(VAEConfig):
    """The shape of an autoencoder with ``codes`` vectors in its codebook, each ``latent_channels`` wide."""

    channels: tuple[int, ...] = (128, 256, 512)
    latent_channels: int = 3
    codes: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes < 1:
            raise ValueError(f"codes: expected at least 1, got {self.codes}")


class Codebook(nn.Module):
    """The vectors that a latent may be made of."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    def nearest(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) → the index of the nearest vector at each position, (B, h, w); distances are in
        float32 whatever z is."""
        table = self.embedding.weight.float()  # (K, C)
        rows = z.float().movedim(1, -1).flatten(0, 2)  # (B·h·w, C)
        squares = table.square().sum(1)  # |z − e|² = |z|² − 2 z·e + |e|², where |z|² decides nothing
        # 4096: memory stays bounded
        indices = [torch.addmm(squares, part, table.T, alpha=-2).argmin(1) for part in rows.split(4096)]
        return torch.cat(indices).view(len(z), *z.shape[-2:])

    def vectors(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) → latents (B, C, h, w)."""
        return self.embedding(indices).movedim(-1, 1)


class VQModel(nn.Module):
    """Pictures in [−1, 1] to latents and back. Diffusion runs on the continuous latents; decoding first takes
    each to its nearest code."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = VAEEncoder(config, latent)
        self.decoder = VAEDecoder(config)
        self.quant_conv = nn.Conv2d(latent, latent, 1)
        self.quantize = Codebook(config.codes, latent)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x: Tensor) -> Point:
        """x (B, 3, H, W) in [−1, 1], H and W multiples of the factor → the latent (B, C, H/f, W/f) before
        quantisation; ValueError otherwise."""
        check_size(x, self.config.factor)
        x = F.pixel_unshuffle(x, self.config.patch)
        return Point(self.quant_conv(self.encoder(x)).float())

    def indices(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) → the indices of their codes (B, h, w)."""
        return self.quantize.nearest(z)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), quantised here → pictures (B, 3, f·h, f·w), about [−1, 1]."""
        return self.decode_indices(self.indices(z))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """The indices of codes (B, h, w) → pictures (B, 3, f·h, f·w), about [−1, 1]."""
        return F.pixel_shuffle(
            self.decoder(self.post_quant_conv(self.quantize.vectors(indices))), self.config.patch
        )
