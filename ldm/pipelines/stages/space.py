"""Where a diffusion of pictures runs: in the latents of an autoencoder, or in pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Space(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] ↔ what the diffusion runs on. ``vae`` None: the pixels themselves, in
    [−1, 1]."""

    def __init__(self, vae: nn.Module | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scale = scale

    @property
    def channels(self) -> int:
        """Channels of what the diffusion runs on."""
        return 3 if self.vae is None else self.vae.config.latent_channels

    @property
    def factor(self) -> int:
        """ImageRecord size over the diffusion's size."""
        return 1 if self.vae is None else self.vae.config.factor

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's size; ValueError for a size that the autoencoder cannot hold."""
        for side, value in (("height", height), ("width", width)):
            if value < self.factor or value % self.factor:
                near = max(self.factor, round(value / self.factor) * self.factor)
                raise ValueError(
                    f"{side} {value}: expected a multiple of {self.factor}, the autoencoder's factor; the"
                    f" nearest is {near}"
                )
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, x: Tensor, device: torch.device) -> Tensor:
        """Pictures in [0, 1] → float32 on the device: the posterior's mean, scaled."""
        x = (2 * x - 1).to(device)
        if self.vae is None:
            return x.float()
        return self.vae.encode(x.to(next(self.vae.parameters()).dtype)).mode().float() * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """→ pictures float32 in [0, 1] on the CPU; values outside are clamped, NaN stays to be found."""
        x = z if self.vae is None else self.vae.decode((z / self.scale).to(next(self.vae.parameters()).dtype))
        return ((x.float() + 1) / 2).clamp(0, 1).cpu()
