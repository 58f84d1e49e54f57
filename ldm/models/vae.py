"""The KL-regularized autoencoder of latent diffusion (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.layers.attention import AttentionBlock
from ldm.models.layers.modules import ModuleListOf
from ldm.models.layers.norm import apply_norm, group_norm_32, make_norm
from ldm.models.layers.resblock import Downsample, Resample, ResBlock, Upsample
from ldm.models.posterior import Posterior


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of an autoencoder; the defaults are those of Stable Diffusion.

    Args:
        channels: Channels of each level, largest size first. Each level but the last halves the size.
        blocks: Residual blocks of a level in the encoder; the decoder has one more. Default: 2.
        latent_channels: Channels C of the latent. Default: 4.
        picture_channels: Channels of an image. Default: 3.
        attention_levels: Levels, counted from 0, whose residual blocks are followed by attention.
            Default: none.
        mid_attention: Whether the smallest size has attention between its two residual blocks.
            Default: True.
        patch: Side p of the image patches that are positions of the first level; the decoder puts the
            patches together. All published models have 1. With 2, small models avoid convolutions at full
            size, which take most of their time. Default: 1.

    Raises:
        ValueError: If a number is below 1, or `attention_levels` names a level that does not exist.
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
            raise ValueError(f"channels: expected one positive number per level, got {self.channels}")
        check_positive(
            blocks=self.blocks,
            latent_channels=self.latent_channels,
            picture_channels=self.picture_channels,
            patch=self.patch,
        )
        if any(not 0 <= level < len(self.channels) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels: expected levels from 0 to {len(self.channels) - 1}, got"
                f" {self.attention_levels}"
            )

    @property
    def factor(self) -> int:
        """Image size divided by latent size."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def patch_channels(self) -> int:
        """Input channels of the first level: the values of one patch."""
        return self.picture_channels * self.patch**2


def self_attention(channels: int, spatial: int | None = None) -> AttentionBlock:
    """Return attention with one head over the positions of a map; `spatial` as in `AttentionBlock`."""
    return AttentionBlock(channels, heads=1, head_dim=channels, eps=1e-6, spatial=spatial)


def check_size(x: Tensor, factor: int) -> None:
    """Raise ValueError unless height and width of the image x (B, 3, H, W) are multiples of `factor`."""
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise ValueError(f"image size {x.shape[-2]}×{x.shape[-1]}: expected multiples of {factor}")


class VAELevel(nn.Module):
    """Residual blocks at one size, then a change of size.

    Args:
        channels: Input channels C.
        out_channels: Output channels C_out.
        blocks: Number of residual blocks.
        attention: Whether attention follows each residual block.
        resample: "down" halves the size, "up" doubles it, None keeps it.
        spatial: Channels C_z of a latent that modulates the norms; see `ResBlock`. Default: None.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        blocks: int,
        attention: bool,
        resample: Resample | None,
        spatial: int | None = None,
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (blocks - 1)
        self.resnets: ModuleListOf[ResBlock] = ModuleListOf(
            ResBlock(width, out_channels, eps=1e-6, spatial=spatial) for width in widths
        )
        self.attentions: ModuleListOf[AttentionBlock] | None = (
            ModuleListOf(self_attention(out_channels, spatial) for _ in range(blocks)) if attention else None
        )
        # lists of one element, because the published names are downsamplers.0 and upsamplers.0
        self.downsamplers: ModuleListOf[Downsample] | None = None
        self.upsamplers: ModuleListOf[Upsample] | None = None
        if resample == "down":
            self.downsamplers = ModuleListOf([Downsample(out_channels, asymmetric=True)])
        elif resample == "up":
            self.upsamplers = ModuleListOf([Upsample(out_channels)])

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the output (B, C_out, h', w') for x (B, C, h, w) and the modulating latent z, if any."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, z=z)  # (B, C_out, h, w)
            if self.attentions is not None:
                x = self.attentions[i](x, z=z)  # (B, C_out, h, w)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)  # (B, C_out, h/2, w/2)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x)  # (B, C_out, 2h, 2w)
        return x


class VAEMid(nn.Module):
    """Residual block, attention (unless switched off) and residual block at the smallest size."""

    def __init__(self, channels: int, *, attention: bool, spatial: int | None = None) -> None:
        super().__init__()
        self.resnets: ModuleListOf[ResBlock] = ModuleListOf(
            ResBlock(channels, channels, eps=1e-6, spatial=spatial) for _ in range(2)
        )
        self.attentions: ModuleListOf[AttentionBlock] | None = (
            ModuleListOf([self_attention(channels, spatial)]) if attention else None
        )

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the output (B, C, h, w) for x (B, C, h, w) and the modulating latent z, if any."""
        x = self.resnets[0](x, z=z)  # (B, C, h, w)
        if self.attentions is not None:
            x = self.attentions[0](x, z=z)  # (B, C, h, w)
        return self.resnets[1](x, z=z)


class VAEEncoder(nn.Module):
    """Encoder of images to the moments of a latent; f below is `VAEConfig.factor` and p the patch.

    Args:
        config: Shape of the autoencoder.
        moments: Output channels M.
    """

    def __init__(self, config: VAEConfig, moments: int) -> None:
        super().__init__()
        first, *_, last = config.channels if len(config.channels) > 1 else config.channels * 2
        self.conv_in = nn.Conv2d(config.patch_channels, first, 3, padding=1)
        self.down_blocks: ModuleListOf[VAELevel] = ModuleListOf()
        width = first
        for level, channels in enumerate(config.channels):
            resample: Resample | None = "down" if level < len(config.channels) - 1 else None
            attention = level in config.attention_levels
            self.down_blocks.append(
                VAELevel(width, channels, blocks=config.blocks, attention=attention, resample=resample)
            )
            width = channels
        self.mid_block = VAEMid(last, attention=config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(group_norm_32(last), last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, moments, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the moments (B, M, H/f, W/f) of patches x (B, 3·p², H/p, W/p)."""
        x = self.conv_in(x)  # (B, channels[0], H/p, W/p)
        for block in self.down_blocks:
            x = block(x)  # (B, channels[level], h, w) at the next level's size
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nn.Module):
    """Decoder of latents to images; f below is `VAEConfig.factor` and p the patch.

    Args:
        config: Shape of the autoencoder.
        spatial: Channels C_z of a latent that modulates every norm. None for group norms. Default: None.
    """

    def __init__(self, config: VAEConfig, *, spatial: int | None = None) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, last, 3, padding=1)
        self.mid_block = VAEMid(last, attention=config.mid_attention, spatial=spatial)
        self.up_blocks: ModuleListOf[VAELevel] = ModuleListOf()
        width = last
        for level in reversed(range(len(config.channels))):
            channels, attention = config.channels[level], level in config.attention_levels
            resample: Resample | None = "up" if level > 0 else None
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
        """Return patches (B, 3·p², f·h/p, f·w/p).

        Args:
            x: Latent, shape (B, C, h, w).
            z: Latent that modulates the norms, shape (B, C_z, *, *); None for group norms.
        """
        x = self.mid_block(self.conv_in(x), z)  # (B, channels[-1], h, w)
        for block in self.up_blocks:
            x = block(x, z)  # (B, channels[level], h', w') at the next level's size
        return self.conv_out(F.silu(apply_norm(self.conv_norm_out, x, z)))


class AutoencoderKL(nn.Module):
    """Autoencoder of images in [−1, 1], with a Gaussian posterior over latents.

    Latents are not scaled here; the pipeline does that. f below is `VAEConfig.factor` and p the patch.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = VAEEncoder(config, 2 * latent)
        self.decoder = VAEDecoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x: Tensor) -> Posterior:
        """Return the posterior over latents (B, C, H/f, W/f), in float32.

        Args:
            x: Images in [−1, 1], shape (B, 3, H, W).

        Raises:
            ValueError: If H or W is not a multiple of f.
        """
        check_size(x, self.config.factor)
        x = F.pixel_unshuffle(x, self.config.patch)  # (B, 3·p², H/p, W/p)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)  # (B, C, H/f, W/f) each
        return Posterior(mean.float(), logvar.float().clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, f·h, f·w), about in [−1, 1], of latents z (B, C, h, w)."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.patch)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """Return the reconstruction from a sampled latent, and the posterior, for a training step.

        Args:
            x: Images in [−1, 1], shape (B, 3, H, W).
            noise: Standard normal noise, shape (B, C, H/f, W/f).
        """
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,), of images a and b (B, 3, H, W) in [−1, 1]."""
    mse = (a.float() - b.float()).square().flatten(1).mean(1)  # (B,)
    return 10 * torch.log10(4.0 / mse.clamp_min(1e-12))
