"""The vector-quantized autoencoder of latent diffusion (Rombach et al. 2022, section 3.1).

Vector quantization is due to van den Oord et al. (2017), the architecture to Esser et al. (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.posterior import Point
from ldm.models.vae import VAEConfig, VAEDecoder, VAEEncoder, check_size


@dataclass(frozen=True, kw_only=True)
class VQConfig(VAEConfig):
    """Shape of a vector-quantized autoencoder; the other arguments are those of `VAEConfig`.

    Args:
        latent_channels: Channels C of the latent, and width of a codebook vector. Default: 3.
        codes: Number K of vectors in the codebook. Default: 8192.
    """

    channels: tuple[int, ...] = (128, 256, 512)
    latent_channels: int = 3
    codes: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(codes=self.codes)


class Codebook(nn.Module):
    """The K vectors, of width C, that positions of a latent are quantized to."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    @torch.no_grad()
    def fit(self, rows: Tensor, *, seed: int = 0, iterations: int = 30) -> float:
        """Set the vectors to the means of clusters of rows, by Lloyd's algorithm (k-means).

        A cluster without rows begins again at the row that is farthest from its vector.

        Args:
            rows: At least K rows, float32, shape (N, C).
            seed: Seed of the choice of the rows that are the first vectors. Default: 0.
            iterations: Number of iterations. Default: 30.

        Returns:
            The mean squared distance of a row to its vector, before the last iteration.

        Raises:
            ValueError: If there are fewer than K rows.
        """
        table = self.embedding.weight
        if len(rows) < len(table):
            raise ValueError(f"rows: {len(rows)}, expected at least one for each of {len(table)} codes")
        generator = torch.Generator("cpu").manual_seed(seed)
        table.copy_(rows[torch.randperm(len(rows), generator=generator, device="cpu")[: len(table)]])
        error = 0.0
        for _ in range(iterations):
            indices = self.nearest(rows.T[None, :, :, None]).flatten()  # (N,)
            distances = (rows - table[indices]).square().sum(1)  # (N,)
            error = float(distances.mean())
            counts = torch.bincount(indices, minlength=len(table))  # (K,)
            sums = torch.zeros_like(table).index_add_(0, indices, rows)  # (K, C)
            empty = counts == 0
            table.copy_(sums / counts.clamp_min(1)[:, None])
            table[empty] = rows[distances.topk(int(empty.sum())).indices]
        return error

    def nearest(self, z: Tensor) -> Tensor:
        """Return the index of the nearest vector at each position, (B, h, w), for z (B, C, h, w).

        Distances are computed in float32, whatever the dtype of z.
        """
        table = self.embedding.weight.float()  # (K, C)
        rows = z.float().movedim(1, -1).flatten(0, 2)  # (B·h·w, C)
        squares = table.square().sum(1)  # (K,); |z − e|² = |z|² − 2 z·e + |e|², and |z|² is constant
        # parts of 4096 positions bound the memory
        indices = [torch.addmm(squares, part, table.T, alpha=-2).argmin(1) for part in rows.split(4096)]
        return torch.cat(indices).view(len(z), *z.shape[-2:])

    def vectors(self, indices: Tensor) -> Tensor:
        """Return the vectors (B, C, h, w) of indices (B, h, w)."""
        return self.embedding(indices).movedim(-1, 1)


class VQModel(nn.Module):
    """Autoencoder of images in [−1, 1] whose decoder quantizes latents to the nearest codes.

    Diffusion runs on the continuous latents that `encode` returns. f below is `VAEConfig.factor`.
    """

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
        """Return the latent (B, C, H/f, W/f) before quantization, in float32.

        Args:
            x: Images in [−1, 1], shape (B, 3, H, W).

        Raises:
            ValueError: If H or W is not a multiple of f.
        """
        check_size(x, self.config.factor)
        x = F.pixel_unshuffle(x, self.config.patch)  # (B, 3·p², H/p, W/p)
        return Point(self.quant_conv(self.encoder(x)).float())

    def indices(self, z: Tensor) -> Tensor:
        """Return the indices of the nearest codes (B, h, w) of latents z (B, C, h, w)."""
        return self.quantize.nearest(z)

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of latents z (B, C, h, w), quantized first."""
        return self.decode_indices(self.indices(z))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of the indices of codes (B, h, w)."""
        return F.pixel_shuffle(
            self.decoder(self.post_quant_conv(self.quantize.vectors(indices))), self.config.patch
        )
