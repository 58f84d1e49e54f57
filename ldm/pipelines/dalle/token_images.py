"""Images and their grids of tokens, by a vector-quantized autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.support.device import computing_dtype

ABSENT = -1  # stands for a token that is not drawn yet
GREY = 0.5  # of the pixels of such tokens


@dataclass(frozen=True)
class TokenImages:
    """The autoencoder and the range of its images.

    Args:
        vae: The autoencoder, of any kind that has tokens.
        signed: Whether its images are in [−1, 1]; otherwise they are in [0, 1].
    """

    vae: Any
    signed: bool

    @property
    def codes(self) -> int:
        """Number of different tokens."""
        return int(self.vae.config.codes)

    @property
    def factor(self) -> int:
        """Image size divided by the size of the grid."""
        return int(self.vae.config.factor)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the tokens (B, h, w) of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: If the model has only the decoder of its autoencoder.
        """
        x = pixels.to(self._parameter.device, computing_dtype(self.vae))  # (B, 3, H, W)
        z = self.vae.encode(2 * x - 1 if self.signed else x).mode()
        return self.vae.indices(z)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of tokens (B, h, w), float32 in [0, 1] on the CPU, one after the other.

        An image does not depend on the others, and the memory is that of one.
        """
        made = []
        for one in tokens.to(self._parameter.device).split(1):
            x = self.vae.decode_indices(one).float()  # (1, 3, H, W)
            made.append((((x + 1) / 2) if self.signed else x).clamp(0, 1).cpu())
        return torch.cat(made)

    def preview(self, tokens: Tensor) -> Tensor:
        """Return images of tokens (B, h, w) of which some are `ABSENT`; their pixels are grey."""
        absent = (tokens == ABSENT)[:, None].float().cpu()  # (B, 1, h, w)
        pixels = self.decode(tokens.clamp_min(0))
        hidden = F.interpolate(absent, size=pixels.shape[-2:], mode="nearest")  # (B, 1, H, W)
        return pixels * (1 - hidden) + GREY * hidden

    @property
    def _parameter(self) -> nn.Parameter:
        return next(iter(self.vae.parameters()))
