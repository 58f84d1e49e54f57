"""The discrete autoencoder of DALL·E (Ramesh et al. 2021, section 2.1 and appendix A).

Each position of a grid that is 8 times smaller than the image is one of K tokens. Pixels x in [0, 1] are
mapped to (1 − 2ε)·x + ε before encoding, with ε = 0.1, and back after decoding: the likelihood of pixels, a
logit-Laplace distribution, has no density at 0 and 1.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.posterior import Point
from ldm.models.vae import check_size

EPSILON = 0.1
GROUPS = 4  # of blocks, between which the size changes


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Shape of a discrete autoencoder; the defaults are those of DALL·E.

    Args:
        width: Channels of the first group of the encoder and of the last one of the decoder. Default: 256.
        first: Channels that the decoder's tokens are embedded in. Default: 128.
        blocks: Residual blocks of each group. Default: 2.
        picture_channels: Channels of an image. Default: 3.
        codes: Number K of tokens. Default: 8192.

    Raises:
        ValueError: If a number is below 1, or the width is no multiple of 4.
    """

    width: int = 256
    first: int = 128
    blocks: int = 2
    picture_channels: int = 3
    codes: int = 8192

    def __post_init__(self) -> None:
        check_positive(**vars(self))
        if self.width % 4:
            raise ValueError(f"width: expected a multiple of 4, got {self.width}")

    @property
    def factor(self) -> int:
        """Image size divided by the size of the grid of tokens."""
        return 2 ** (GROUPS - 1)


class DVAEConv(nn.Module):
    """Convolution that keeps the size; its parameters are called w and b, as in the published files."""

    def __init__(self, channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(out_channels, channels, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.w, std=(channels * kernel**2) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution (B, C_out, h, w) of x (B, C, h, w)."""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class DVAEBlock(nn.Module):
    """x plus a gain times four convolutions, each after a ReLU.

    Args:
        channels: Input channels.
        out_channels: Output channels, a multiple of 4.
        kernels: Sides of the four kernels.
        gain: Factor of the residual: one over the square of the number of blocks.
    """

    def __init__(self, channels: int, out_channels: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        hidden = out_channels // 4
        widths = (channels, hidden, hidden, hidden, out_channels)
        self.gain = gain
        self.id_path = nn.Identity() if channels == out_channels else DVAEConv(channels, out_channels, 1)
        self.res_path = nn.Sequential(
            OrderedDict(
                (name, part)
                for i, kernel in enumerate(kernels)
                for name, part in (
                    (f"relu_{i + 1}", nn.ReLU()),
                    (f"conv_{i + 1}", DVAEConv(widths[i], widths[i + 1], kernel)),
                )
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, C_out, h, w) for x (B, C, h, w)."""
        return self.id_path(x) + self.gain * self.res_path(x)


class DVAEHalf(nn.Module):
    """The encoder or the decoder: a convolution, groups of blocks, and an output.

    The size changes between the groups.

    Args:
        channels: Input channels.
        widths: Channels of the first convolution, then of each group.
        blocks: Blocks of each group.
        out_channels: Output channels.
        kernel: Side of the first kernel.
        kernels: Sides of the kernels of a block.
        resample: Name and module of the change of size.
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, ...],
        blocks: int,
        out_channels: int,
        *,
        kernel: int,
        kernels: tuple[int, ...],
        resample: tuple[str, nn.Module],
    ) -> None:
        super().__init__()
        gain = 1 / (GROUPS * blocks) ** 2
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=DVAEConv(channels, widths[0], kernel))
        for g in range(1, GROUPS + 1):
            inner: OrderedDict[str, nn.Module] = OrderedDict(
                (f"block_{i + 1}", DVAEBlock(widths[g] if i else widths[g - 1], widths[g], kernels, gain))
                for i in range(blocks)
            )
            if g < GROUPS:
                inner[resample[0]] = resample[1]
            parts[f"group_{g}"] = nn.Sequential(inner)
        output = OrderedDict(relu=nn.ReLU(), conv=DVAEConv(widths[-1], out_channels, 1))
        self.blocks = nn.Sequential(OrderedDict(parts, output=nn.Sequential(output)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, C_out, h', w') for x (B, C, h, w)."""
        return self.blocks(x)


class DVAE(nn.Module):
    """Autoencoder of images in [−1, 1] whose latent is a grid of tokens.

    What `encode` returns are the logits of the tokens; `decode` takes the most probable ones.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = c = config
        up = tuple(c.width * 2**g for g in range(GROUPS))
        self.encoder = DVAEHalf(
            c.picture_channels,
            (c.width, *up),
            c.blocks,
            c.codes,
            kernel=7,
            kernels=(3, 3, 3, 1),
            resample=("pool", nn.MaxPool2d(2)),
        )
        self.decoder = DVAEHalf(
            c.codes,
            (c.first, *up[::-1]),
            c.blocks,
            2 * c.picture_channels,
            kernel=1,
            kernels=(1, 3, 3, 3),
            resample=("upsample", nn.Upsample(scale_factor=2, mode="nearest")),
        )

    def encode(self, x: Tensor) -> Point:
        """Return the logits (B, K, H/8, W/8) of the tokens, in float32.

        Args:
            x: Images in [−1, 1], shape (B, 3, H, W).

        Raises:
            ValueError: If H or W is not a multiple of 8.
        """
        check_size(x, self.config.factor)
        return Point(self.encoder((1 - 2 * EPSILON) * (x + 1) / 2 + EPSILON).float())

    def indices(self, z: Tensor) -> Tensor:
        """Return the most probable tokens (B, h, w) of logits z (B, K, h, w)."""
        return z.argmax(dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, 8·h, 8·w) in [−1, 1] of logits z (B, K, h, w)."""
        return self.decode_indices(self.indices(z))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Return images (B, 3, 8·h, 8·w) in [−1, 1] of tokens (B, h, w): the most probable pixels."""
        first = self.decoder.blocks[0]
        assert isinstance(first, DVAEConv)
        # the 1×1 convolution of a one-hot map, as a table
        x = F.embedding(indices, first.w[:, :, 0, 0].t()) + first.b  # (B, h, w, C)
        x = self.decoder.blocks[1:](x.movedim(-1, 1))  # (B, 6, 8·h, 8·w)
        mean = x[:, : self.config.picture_channels].sigmoid()  # (B, 3, 8·h, 8·w)
        return ((mean - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1) * 2 - 1
