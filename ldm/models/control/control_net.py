"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): a copy of a UNet's encoder that reads a hint.

The hint, an image of the size of the result, is encoded to the size of the latent and added to the first map:

    h = conv_in(x_t) + E(hint),   skips, middle = encoder(h, t, context)
    residual_i = Z_i(skip_i),     residual_mid = Z(middle)

Each Z is a 1×1 convolution, zero before training. The UNet adds the residuals to its skips and its middle.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.layers.modules import ModuleListOf
from ldm.models.unet_config import UNetConfig
from ldm.models.unet_encoder import UNetEncoder


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """Shape of a ControlNet; the defaults are those for Stable Diffusion 1.

    Args:
        unet: Shape of the UNet whose encoder it copies; `out_channels` is not used.
        hint_channels: Channels of the hint. Default: 3.
        hint_widths: Channels of the hint encoder's maps; each but the first halves the size. Default: 16, 32,
            96, 256: a hint of 8 times the latent's size.
        global_pool: Whether each residual is averaged over its positions, as the shuffle model's are.
            Default: False.

    Raises:
        ValueError: If a number is not positive.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    global_pool: bool = False

    def __post_init__(self) -> None:
        if self.hint_channels < 1 or not self.hint_widths or min(self.hint_widths) < 1:
            raise ValueError(
                f"expected positive hint_channels and hint_widths, got {self.hint_channels} and"
                f" {self.hint_widths}"
            )

    @classmethod
    def of_unet(cls, unet: UNetConfig) -> ControlNetConfig:
        """Return the usual shape for a UNet: it reads x_t alone, and a hint of 8 times the latent's size."""
        return cls(unet=replace(unet, in_channels=unet.out_channels, guidance_dim=None))

    @property
    def factor(self) -> int:
        """Size of a hint divided by that of the latent."""
        return 2 ** (len(self.hint_widths) - 1)


class HintEncoder(nn.Module):
    """3×3 convolutions with SiLU that bring a hint to the size of the latent; the last one begins as zero."""

    def __init__(self, channels: int, widths: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks: ModuleListOf[nn.Conv2d] = ModuleListOf()
        for width, wider in zip(widths[:-1], widths[1:], strict=True):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = zeroed(nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:
        """Return the encoding (B, C, h, w) of hints (B, C_hint, factor·h, factor·w)."""
        x = F.silu(self.conv_in(hint))  # (B, widths[0], H, W)
        for conv in self.blocks:
            x = F.silu(conv(x))  # (B, widths[i], H', W')
        return self.conv_out(x)


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution whose weights are set to zero."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ControlNet(UNetEncoder):
    """The network `net(x_t, t, cond, hint)` that returns the residuals of a UNet.

    `ControlNet(config)` has random weights; `ControlNet.copy_of(unet)` begins a training.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.control = config
        widths = config.unet.skips
        self.controlnet_cond_embedding = HintEncoder(config.hint_channels, config.hint_widths, widths[0])
        self.controlnet_down_blocks: ModuleListOf[nn.Conv2d] = ModuleListOf(
            zeroed(nn.Conv2d(width, width, 1)) for width in widths
        )
        self.controlnet_mid_block = zeroed(nn.Conv2d(widths[-1], widths[-1], 1))

    @classmethod
    def copy_of(
        cls, unet: UNetEncoder, *, hint_channels: int = 3, hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    ) -> ControlNet:
        """Return a ControlNet with a copy of a UNet's encoder, whose residuals are zero.

        Args:
            unet: The UNet. If it reads channels beside x_t (`Cond.concat`), the ControlNet does too.
            hint_channels, hint_widths: See `ControlNetConfig`. A hint has 2^(n − 1) times the size of the
                latent, for n widths.
        """
        shape = ControlNetConfig(unet=replace(unet.config, guidance_dim=None))
        made = cls(replace(shape, hint_channels=hint_channels, hint_widths=hint_widths))
        first = next(unet.parameters())
        made.to(first.device, first.dtype)
        own, state = made.state_dict(), unet.state_dict()
        with torch.no_grad():
            for name, value in own.items():
                if name in state:
                    value.copy_(state[name])
        return made.train(unet.training)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, hint: Tensor) -> tuple[Tensor, ...]:
        """Return the residuals, each (B, C, h', w'); of a global pool (B, C, 1, 1).

        Args:
            x_t: Noisy sample, shape (B, C, h, w).
            t: Timesteps, shape (B,); they may be fractional.
            cond: `context`, with its mask, and `pooled` of the UNet.
            hint: The encoded hint, from `controlnet_cond_embedding`, shape (B, channels[0], h, w).

        Raises:
            ValueError: If x_t, the condition or the hint do not fit.
        """
        self.check(x_t, cond)
        h = self.conv_in(x_t)  # (B, channels[0], h, w)
        self.check_hint(hint, h)
        return self.residuals(h + hint, self.embed(t, cond, x_t.dtype), cond)

    def check_hint(self, hint: Tensor, h: Tensor) -> None:
        """Raise ValueError for an encoded hint of another shape than the first map h."""
        if hint.shape != h.shape:
            raise ValueError(f"hint: expected an encoding of shape {tuple(h.shape)}, got {tuple(hint.shape)}")

    def residuals(self, h: Tensor, emb: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """Return the residuals of the first map h (B, channels[0], h, w) with a hint, and of emb (B, D)."""
        x, skips = self.way_down(h, emb, cond)
        x = self.mid_block(x, emb, cond.context, cond.context_mask)  # (B, channels[-1], h', w')
        maps = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        maps.append(self.controlnet_mid_block(x))
        return tuple(m.mean((2, 3), keepdim=True) if self.control.global_pool else m for m in maps)
