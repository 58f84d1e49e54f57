"""Stable unCLIP's condition: the image embedding, noised to a level that the network is told (Ho et al. 2022,
cascaded diffusion, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.layers.embeddings import sinusoid


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """``embed_dim``: E of the embeddings; ``timesteps``: the levels of the cosine schedule."""

    embed_dim: int = 1024
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.embed_dim < 2 or self.timesteps < 1:
            raise ValueError(
                f"embed_dim and timesteps: expected at least 2 and 1, got {self.embed_dim} and"
                f" {self.timesteps}"
            )


class NoiseAugmentation(nn.Module):
    """Embeddings (B, E) → vectors (B, 2·E): normalised, noised, brought back, and the sinusoid of the level
    behind them.

    ``mean`` and ``std`` (1, E) are stored with the weights of Stable unCLIP-l; those of -h are 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: AugmentationConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("cpu"):  # its tables are numbers wherever the network is built
            self.schedule = NoiseSchedule.cosine(config.timesteps)
        self.register_buffer("mean", torch.empty(1, config.embed_dim))
        self.register_buffer("std", torch.empty(1, config.embed_dim))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Mean 0 and deviation 1."""
        self.mean.zero_()
        self.std.fill_(1)

    def forward(self, embedding: Tensor, level: int, noise: Tensor) -> Tensor:
        """The condition at a level, with standard normal noise (B, E); level 0 is noised too, as little as
        the schedule begins with."""
        if not 0 <= level < self.config.timesteps:
            raise ValueError(f"noise_level: expected 0 to {self.config.timesteps - 1}, got {level}")
        z = self.schedule.add_noise((embedding - self.mean) / self.std, level, noise) * self.std + self.mean
        levels = torch.full((len(z),), level, device=z.device)
        return torch.cat([z, sinusoid(levels, self.config.embed_dim).to(z.dtype)], dim=1)
