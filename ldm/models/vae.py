"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.attention import AttentionBlock
from ldm.models.layers.norm import group_norm_32, make_norm, normed
from ldm.models.layers.resblock import Downsample, ResBlock, Upsample


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The shape of an autoencoder. ``channels`` has one entry a level; each level but the last halves the
    picture.

    ``patch``: the picture is first cut into patches of patch × patch pixels, each one position of the first
    level, and the decoder puts them back. 1 in every published model; 2 spares small models the convolutions
    at full size, most of their time.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 4
    picture_channels: int = 3
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    patch: int = 1

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels: expected one positive number a level, got {self.channels}")
        for name in ("blocks", "latent_channels", "picture_channels", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if any(not 0 <= level < len(self.channels) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels: expected levels 0 to {len(self.channels) - 1}, got"
                f" {self.attention_levels}"
            )

    @property
    def factor(self) -> int:
        """ImageRecord size over latent size."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def patch_channels(self) -> int:
        """Channels of the first level's input: the pixels of one patch."""
        return self.picture_channels * self.patch**2


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents: ``mean`` and ``logvar`` (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """The most probable latent: the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, with standard normal noise of the mean's shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, 1)) per sample, in nats, summed over the latent's entries: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


@dataclass(frozen=True)
class Point:
    """A latent without spread, from autoencoders that have no posterior: ``mean`` (B, C, h, w); it answers as
    a `Posterior` does."""

    mean: Tensor

    def mode(self) -> Tensor:
        """The latent."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """The latent, whatever the noise."""
        return self.mean


def self_attention(channels: int, spatial: int | None = None) -> AttentionBlock:
    """One head of attention over the positions of a feature map, as wide as the map."""
    return AttentionBlock(channels, heads=1, head_dim=channels, eps=1e-6, spatial=spatial)


def check_size(x: Tensor, factor: int) -> None:
    """ValueError unless the height and width of a picture (B, 3, H, W) are multiples of the factor."""
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise ValueError(f"picture size {x.shape[-2]}×{x.shape[-1]}: expected multiples of {factor}")


class VAELevel(nn.Module):
    """Residual blocks at one size, each followed by attention where asked, then a change of size.
    ``spatial``: see `ResBlock`."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        blocks: int,
        attention: bool,
        resample: str | None,
        spatial: int | None = None,
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (blocks - 1)
        self.resnets = nn.ModuleList(
            ResBlock(width, out_channels, eps=1e-6, spatial=spatial) for width in widths
        )
        self.attentions = (
            nn.ModuleList(self_attention(out_channels, spatial) for _ in range(blocks)) if attention else None
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, z=z)
            if self.attentions is not None:
                x = self.attentions[i](x, z=z)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


class VAEMid(nn.Module):
    """Block, attention, block at the smallest size."""

    def __init__(self, channels: int, *, attention: bool, spatial: int | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(channels, channels, eps=1e-6, spatial=spatial) for _ in range(2)
        )
        self.attentions = nn.ModuleList([self_attention(channels, spatial)]) if attention else None

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, z=z)
        if self.attentions is not None:
            x = self.attentions[0](x, z=z)
        return self.resnets[1](x, z=z)


class VAEEncoder(nn.Module):
    """Pictures (B, 3, H, W) to moments (B, moments, H/f, W/f)."""

    def __init__(self, config: VAEConfig, moments: int) -> None:
        super().__init__()
        first, *_, last = config.channels if len(config.channels) > 1 else config.channels * 2
        self.conv_in = nn.Conv2d(config.patch_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = first
        for level, channels in enumerate(config.channels):
            resample = "down" if level < len(config.channels) - 1 else None
            attention = level in config.attention_levels
            self.down_blocks.append(
                VAELevel(width, channels, blocks=config.blocks, attention=attention, resample=resample)
            )
            width = channels
        self.mid_block = VAEMid(last, attention=config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(group_norm_32(last), last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, moments, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nn.Module):
    """Latents (B, C, h, w) to pictures (B, 3, f·h, f·w). ``spatial``: the channels of a latent that modulates
    every norm."""

    def __init__(self, config: VAEConfig, *, spatial: int | None = None) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, last, 3, padding=1)
        self.mid_block = VAEMid(last, attention=config.mid_attention, spatial=spatial)
        self.up_blocks = nn.ModuleList()
        width = last
        for level in reversed(range(len(config.channels))):
            channels, attention = config.channels[level], level in config.attention_levels
            resample = "up" if level > 0 else None
            level_up = VAELevel(
                width,
                channels,
                blocks=config.blocks + 1,
                attention=attention,
                resample=resample,
                spatial=spatial,
            )
            self.up_blocks.append(level_up)
            width = channels
        self.conv_norm_out = make_norm(first, eps=1e-6, spatial=spatial)
        self.conv_out = nn.Conv2d(first, config.patch_channels, 3, padding=1)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        x = self.mid_block(self.conv_in(x), z)
        for block in self.up_blocks:
            x = block(x, z)
        return self.conv_out(F.silu(normed(self.conv_norm_out, x, z)))


class AutoencoderKL(nn.Module):
    """Pictures in [−1, 1] to a Gaussian over latents, and back. The latents are not scaled here: the pipeline
    does that."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = VAEEncoder(config, 2 * latent)
        self.decoder = VAEDecoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x: Tensor) -> Posterior:
        """x (B, 3, H, W) in [−1, 1], H and W multiples of the factor → the posterior over (B, C, H/f, W/f);
        ValueError otherwise."""
        check_size(x, self.config.factor)
        x = F.pixel_unshuffle(x, self.config.patch)  # (B, 3·p², H/p, W/p)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean.float(), logvar.float().clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) → pictures (B, 3, f·h, f·w), about [−1, 1]."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.patch)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """The reconstruction from a sampled latent, and the posterior it came from: one training step's
        worth."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in [−1, 1] in dB, one for each of the batch: (B,)."""
    mse = (a.float() - b.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / mse.clamp_min(1e-12))
