"""An autoencoder whose encoder is one orthogonal projection of image patches, with a residual decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.posterior import Posterior
from ldm.models.vae import VAEConfig, VAEDecoder, check_size


@dataclass(frozen=True, kw_only=True)
class PatchAutoencoderConfig:
    """Shape of a `PatchAutoencoder`.

    Args:
        factor: Image size divided by latent size: the side f of a patch. Default: 8.
        latent_channels: Channels C of the latent, at most 3·f². Default: 32.
        channels: Channels of each level of the residual decoder, largest size first; each level but the last
            halves the size, and the last has the size of the latent.
        blocks: Residual blocks of a level, less one. Default: 1.
        noise: Standard deviation of the posterior, in units of the latent. Default: 0.05.

    Raises:
        ValueError: If the numbers do not fit together.
    """

    factor: int = 8
    latent_channels: int = 32
    channels: tuple[int, ...] = (64, 160)
    blocks: int = 1
    noise: float = 0.05

    def __post_init__(self) -> None:
        check_positive(factor=self.factor, latent_channels=self.latent_channels, blocks=self.blocks)
        if self.latent_channels > 3 * self.factor**2:
            raise ValueError(
                f"latent_channels {self.latent_channels}: expected at most {3 * self.factor**2}, the numbers"
                f" of a patch of {self.factor}×{self.factor} pixels"
            )
        if self.factor % 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"factor {self.factor}: expected a multiple of {2 ** (len(self.channels) - 1)} for"
                f" {len(self.channels)} levels"
            )
        if not 0 < self.noise < float("inf"):
            raise ValueError(f"noise {self.noise}: expected a positive number")

    def decoder(self) -> VAEConfig:
        """Return the shape of the residual decoder."""
        return VAEConfig(
            channels=self.channels,
            blocks=self.blocks,
            latent_channels=self.latent_channels,
            mid_attention=False,
            patch=self.factor // 2 ** (len(self.channels) - 1),
        )


def patches(images: Tensor, factor: int) -> Tensor:
    """Return the patches of f×f pixels of images (B, 3, H, W), (N, 3·f²); H and W are multiples of f."""
    check_size(images, factor)
    return F.pixel_unshuffle(images, factor).movedim(1, -1).flatten(0, -2)


def principal_components(images: Tensor, factor: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first principal components of the patches of images.

    Args:
        images: Images, shape (B, 3, H, W), of which there are at least as many patches as a patch has
            numbers.
        factor: Side f of a patch in pixels.
        count: Number C of components.

    Returns:
        Orthonormal components (C, 3·f²), the mean patch (3·f²,), and the standard deviations of the
        components, in units of the pixels, (C,); float64.

    Raises:
        ValueError: If there are too few patches, or a component is constant.
    """
    x = patches(images.double(), factor)  # (N, 3·f²)
    if len(x) < x.shape[1]:
        raise ValueError(f"{len(x)} patches: expected at least {x.shape[1]} to fit the projection to")
    mean = x.mean(dim=0)  # (3·f²,)
    variances, vectors = torch.linalg.eigh(torch.cov((x - mean).T, correction=0))  # in rising order
    deviations = variances.flip(0)[:count].clamp_min(0).sqrt()  # (C,)
    if float(deviations[-1]) < 1e-4:
        raise ValueError(
            f"component {count} of the patches has a standard deviation of {float(deviations[-1]):.2g}:"
            " expected at least 1e-4; use fewer latent_channels or more images"
        )
    components = vectors.flip(1)[:, :count].T  # (C, 3·f²)
    sign = components.sum(dim=1, keepdim=True).sign()  # it is otherwise arbitrary
    return components * sign, mean, deviations


class PatchAutoencoder(nn.Module):
    """Autoencoder of images in [−1, 1]: principal components of patches, and a decoder that sharpens them.

    The encoder projects each f×f patch onto the first C principal components of patches of the training
    images (`fit`), so it needs no training, and shifts, mixtures and changes of color of an image act
    linearly on its latent. The decoder is the transposed projection plus a convolutional residual, which is
    trained. The residual path from image to latent and back follows DC-AE (Chen et al. 2024, section 3.2).
    """

    def __init__(self, config: PatchAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        numbers = 3 * config.factor**2
        self.project = nn.Conv2d(numbers, config.latent_channels, 1)
        self.unproject = nn.Conv2d(config.latent_channels, numbers, 1)
        self.residual = VAEDecoder(config.decoder())
        nn.init.zeros_(self.residual.conv_out.weight)
        nn.init.zeros_(self.residual.conv_out.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def fit(self, images: Tensor) -> Tensor:
        """Set the projections to the principal components of the patches of images.

        Component i, of standard deviation s_i over the patches, is divided by √s_i: small components are
        enlarged, but not to the size of the large ones. All are then divided by one number, so that the
        latents of these images have mean square 1.

        Args:
            images: Images in [−1, 1], shape (B, 3, H, W), of which there are at least as many patches as a
                patch has numbers.

        Returns:
            The standard deviations of the first C components, in units of the pixels, shape (C,).

        Raises:
            ValueError: If there are too few patches, or a component is constant.
        """
        components, mean, deviations = principal_components(
            images, self.config.factor, self.config.latent_channels
        )
        scale = deviations.sqrt() * deviations.mean().sqrt()  # (C,): latents have mean square 1
        self.project.weight.copy_((components / scale[:, None])[..., None, None])
        self.project.bias.copy_(-(components @ mean) / scale)  # type: ignore[union-attr]
        self.unproject.weight.copy_((components.T * scale)[..., None, None])
        self.unproject.bias.copy_(mean)  # type: ignore[union-attr]
        return deviations.float()

    def encode(self, x: Tensor) -> Posterior:
        """Return the posterior over latents (B, C, H/f, W/f), in float32.

        Args:
            x: Images in [−1, 1], shape (B, 3, H, W).

        Raises:
            ValueError: If H or W is not a multiple of f.
        """
        check_size(x, self.config.factor)
        mean = self.project(F.pixel_unshuffle(x, self.config.factor)).float()  # (B, C, H/f, W/f)
        return Posterior(mean, torch.full_like(mean, self.config.noise).log().mul(2))

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of latents z (B, C, h, w)."""
        smooth = F.pixel_shuffle(self.unproject(z), self.config.factor)  # (B, 3, f·h, f·w)
        return smooth + F.pixel_shuffle(self.residual(z), self.config.decoder().patch)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """Return the reconstruction from a sampled latent, and the posterior, for a training step.

        Args:
            x: Images in [−1, 1], shape (B, 3, H, W).
            noise: Standard normal noise, shape (B, C, H/f, W/f).
        """
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior
