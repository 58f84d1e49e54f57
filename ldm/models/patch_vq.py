"""A vector-quantized autoencoder of image patches: a fitted encoder and codebook, and a trained decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.patch_autoencoder import PatchAutoencoderConfig, patches, principal_components
from ldm.models.posterior import Point
from ldm.models.vae import VAEDecoder, check_size
from ldm.models.vq import Codebook


@dataclass(frozen=True, kw_only=True)
class PatchVQConfig:
    """Shape of a `PatchVQ`.

    Args:
        codes: Number K of vectors in the codebook. Default: 1024.
        factor: Image size divided by the size of the grid of tokens: the side f of a patch. Default: 8.
        latent_channels: Channels C of the latent, at most 3·f². Default: 32.
        channels: Channels of each level of the residual decoder, largest size first; each level but the last
            halves the size, and the last has the size of the latent. Default: (48, 80).
        blocks: Residual blocks of a level, less one. Default: 1.

    Raises:
        ValueError: If the numbers do not fit together.
    """

    codes: int = 1024
    factor: int = 8
    latent_channels: int = 32
    channels: tuple[int, ...] = (48, 80)
    blocks: int = 1

    def __post_init__(self) -> None:
        check_positive(codes=self.codes)
        self.patches()

    def patches(self) -> PatchAutoencoderConfig:
        """Return the shape of the autoencoder without quantization."""
        return PatchAutoencoderConfig(
            factor=self.factor,
            latent_channels=self.latent_channels,
            channels=self.channels,
            blocks=self.blocks,
        )


class PatchVQ(nn.Module):
    """Autoencoder of images in [−1, 1] with one code for each f×f patch.

    The encoder projects a patch onto the first C principal components of patches of the training images, so
    that distances between latents are those between pixels. The codebook holds the means of clusters of
    latents (`fit`). Neither is trained, so the tokens of an image are known before any training. The decoder
    sees the codes of the neighbouring patches: it is the transposed projection plus a convolutional
    residual, which is trained.
    """

    def __init__(self, config: PatchVQConfig) -> None:
        super().__init__()
        self.config = config
        numbers = 3 * config.factor**2
        self.project = nn.Conv2d(numbers, config.latent_channels, 1)
        self.quantize = Codebook(config.codes, config.latent_channels)
        self.unproject = nn.Conv2d(config.latent_channels, numbers, 1)
        self.residual = VAEDecoder(config.patches().decoder())
        nn.init.zeros_(self.residual.conv_out.weight)
        nn.init.zeros_(self.residual.conv_out.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def fit(self, images: Tensor, *, seed: int = 0, iterations: int = 30) -> float:
        """Set the projections to principal components and the codebook to means of clusters.

        A patch that occurs several times counts once, so that flat backgrounds do not outweigh the rest.

        Args:
            images: Images in [−1, 1], shape (B, 3, H, W), with at least K different patches, and at least as
                many patches as a patch has numbers.
            seed: Seed of the first choice of the clusters' means. Default: 0.
            iterations: Iterations of Lloyd's algorithm. Default: 30.

        Returns:
            The mean squared distance of a patch's latent to its code.

        Raises:
            ValueError: If there are too few patches, or a component is constant.
        """
        components, mean, _ = principal_components(images, self.config.factor, self.config.latent_channels)
        self.project.weight.copy_(components[..., None, None])
        self.project.bias.copy_(-components @ mean)  # type: ignore[union-attr]
        self.unproject.weight.copy_(components.T[..., None, None])
        self.unproject.bias.copy_(mean)  # type: ignore[union-attr]
        different = patches(images, self.config.factor).unique(dim=0)  # (N, 3·f²)
        latents = different.float() @ self.project.weight[..., 0, 0].T + self.project.bias  # (N, C)
        return self.quantize.fit(latents, seed=seed, iterations=iterations)

    def encode(self, x: Tensor) -> Point:
        """Return the latent (B, C, H/f, W/f) before quantization, in float32.

        Args:
            x: Images in [−1, 1], shape (B, 3, H, W).

        Raises:
            ValueError: If H or W is not a multiple of f.
        """
        check_size(x, self.config.factor)
        return Point(self.project(F.pixel_unshuffle(x, self.config.factor)).float())

    def indices(self, z: Tensor) -> Tensor:
        """Return the indices of the nearest codes (B, h, w) of latents z (B, C, h, w)."""
        return self.quantize.nearest(z)

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of latents z (B, C, h, w), quantized first."""
        return self.decode_indices(self.indices(z))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of the indices of codes (B, h, w)."""
        z = self.quantize.vectors(indices)  # (B, C, h, w)
        means = F.pixel_shuffle(self.unproject(z), self.config.factor)  # (B, 3, f·h, f·w)
        return means + F.pixel_shuffle(self.residual(z), self.config.patches().decoder().patch)
