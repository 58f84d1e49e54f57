"""The condition of Stable unCLIP: a noisy image embedding and its noise level.

This is the noise augmentation of cascaded diffusion (Ho et al. 2022, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.layers.embeddings import sinusoid


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Shape of a `NoiseAugmentation`.

    Args:
        embed_dim: Width E of the embedding, at least 2. Default: 1024.
        timesteps: Noise levels of the cosine schedule. Default: 1000.

    Raises:
        ValueError: If a number is out of range.
    """

    embed_dim: int = 1024
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.embed_dim < 2 or self.timesteps < 1:
            raise ValueError(
                f"embed_dim and timesteps: expected at least 2 and 1, got {self.embed_dim} and"
                f" {self.timesteps}"
            )


class NoiseAugmentation(nn.Module):
    """Adds noise to normalized embeddings, and appends the sinusoid of the noise level.

    Attributes:
        mean: Mean of the embeddings, shape (1, E). It is stored with the weights of Stable unCLIP-l and is 0
            for Stable unCLIP-h.
        std: Their standard deviation, shape (1, E). It is 1 for Stable unCLIP-h.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: AugmentationConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = NoiseSchedule.cosine(config.timesteps)
        self.register_buffer("mean", torch.empty(1, config.embed_dim))
        self.register_buffer("std", torch.empty(1, config.embed_dim))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Set the mean to 0 and the standard deviation to 1."""
        self.mean.zero_()
        self.std.fill_(1)

    def forward(self, embedding: Tensor, level: int | Tensor, noise: Tensor) -> Tensor:
        """Return the condition (B, 2·E) at a noise level.

        Args:
            embedding: Image embedding, shape (B, E).
            level: Noise level in [0, timesteps), or one for each embedding, (B,) int64. Level 0 adds the
                least noise of the schedule, not none.
            noise: Standard normal noise, shape (B, E).

        Raises:
            ValueError: If a level is out of range.
        """
        levels = torch.as_tensor(level, device=embedding.device).expand(len(embedding))  # (B,)
        if not 0 <= int(levels.min()) <= int(levels.max()) < self.config.timesteps:
            raise ValueError(f"noise_level: expected 0 to {self.config.timesteps - 1}, got {level}")
        # (B, E)
        z = self.schedule.add_noise((embedding - self.mean) / self.std, levels, noise) * self.std + self.mean
        return torch.cat([z, sinusoid(levels, self.config.embed_dim).to(z.dtype)], dim=1)
