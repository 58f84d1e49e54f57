"""TAESD, a tiny autoencoder for previews and slow machines (Bohan 2023).

Its small convolutions replace the large autoencoders of the diffusion models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.posterior import Point
from ldm.models.vae import check_size


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Shape of a tiny autoencoder; the defaults are those of TAESD and TAESDXL.

    Its latents are at the scale of the diffusion model, so they are not scaled again.

    Args:
        width: Channels of all hidden layers. Default: 64.
        encoder: Residual blocks of the encoder at each size, largest size first.
        decoder: Residual blocks of the decoder at each size, smallest size first.
        latent_channels: Channels C of the latent. Default: 4.
        picture_channels: Channels of an image. Default: 3.

    Raises:
        ValueError: If `encoder` and `decoder` differ in length, or a number is out of range.
    """

    width: int = 64
    encoder: tuple[int, ...] = (1, 3, 3, 3)
    decoder: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    picture_channels: int = 3

    def __post_init__(self) -> None:
        if (
            not self.encoder
            or len(self.encoder) != len(self.decoder)
            or min(*self.encoder, *self.decoder) < 0
        ):
            raise ValueError(
                f"encoder and decoder: expected as many numbers of blocks in both, got {self.encoder} and"
                f" {self.decoder}"
            )
        check_positive(
            width=self.width, latent_channels=self.latent_channels, picture_channels=self.picture_channels
        )

    @property
    def factor(self) -> int:
        """Image size divided by latent size."""
        return 2 ** (len(self.encoder) - 1)


class TinyBlock(nn.Module):
    """Three 3×3 convolutions with a residual sum, and a ReLU after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, width, h, w) for x (B, width, h, w)."""
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Encoder of images in [−1, 1] to latents."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(config.picture_channels, width, 3, padding=1)]
        for level, blocks in enumerate(config.encoder):
            if level > 0:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return latents (B, C, H/f, W/f) of images x (B, 3, H, W)."""
        return self.layers((x + 1) / 2)  # the published network takes images in [0, 1]


class TinyDecoder(nn.Module):
    """Decoder of latents, which a tanh limits to ±3, to images about in [−1, 1]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width, last = config.width, len(config.decoder) - 1
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for level, blocks in enumerate(config.decoder):
            layers += [TinyBlock(width) for _ in range(blocks)]
            if level < last:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.picture_channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w) of latents z (B, C, h, w)."""
        return 2 * self.layers(3 * torch.tanh(z / 3)) - 1


class AutoencoderTiny(nn.Module):
    """Autoencoder of images in [−1, 1], with latents at the scale of the diffusion model.

    f below is `TinyConfig.factor`.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    def encode(self, x: Tensor) -> Point:
        """Return the latent (B, C, H/f, W/f), in float32.

        Args:
            x: Images in [−1, 1], shape (B, 3, H, W).

        Raises:
            ValueError: If H or W is not a multiple of f.
        """
        check_size(x, self.config.factor)
        return Point(self.encoder(x).float())

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of latents z (B, C, h, w)."""
        return self.decoder(z)
