"""The tiny autoencoder TAESD: small convolutions in the place of the large first stages, for previews and
slow machines (Bohan 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.vae import Point, check_size


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """The shape of a tiny autoencoder; the defaults are those of TAESD and TAESDXL. ``encoder`` and
    ``decoder``: blocks at each size, in order.

    Its latents have the diffusion model's own scale: what it encodes and decodes is not to be scaled again.
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
        for name in ("width", "latent_channels", "picture_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def factor(self) -> int:
        """ImageRecord size over latent size."""
        return 2 ** (len(self.encoder) - 1)


class TinyBlock(nn.Module):
    """Three convolutions beside the identity, rectified behind the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Pictures in [−1, 1] to latents."""

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
        return self.layers((x + 1) / 2)  # its pictures are in [0, 1]


class TinyDecoder(nn.Module):
    """Latents, softly held within ±3, to pictures in about [−1, 1]."""

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
        return 2 * self.layers(3 * torch.tanh(z / 3)) - 1


class AutoencoderTiny(nn.Module):
    """Pictures in [−1, 1] to latents at the diffusion model's own scale, and back."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    def encode(self, x: Tensor) -> Point:
        """x (B, 3, H, W) in [−1, 1], H and W multiples of the factor → latents (B, C, H/f, W/f); ValueError
        otherwise."""
        check_size(x, self.config.factor)
        return Point(self.encoder(x).float())

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) → pictures (B, 3, f·h, f·w), about [−1, 1]."""
        return self.decoder(z)
