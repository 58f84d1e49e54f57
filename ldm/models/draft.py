"""A draft of the latent from an embedding alone, of a text or an image, which the denoiser starts from and corrects."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.clip import check_positive


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """``embed_dim``: E, the width of an embedding; ``width``: of the ``layers`` hidden ones; ``channels`` and ``size``: the latent's C and side."""

    embed_dim: int
    width: int = 1024
    layers: int = 1
    channels: int = 4
    size: int = 16

    def __post_init__(self) -> None:
        check_positive(embed_dim=self.embed_dim, width=self.width, layers=self.layers, channels=self.channels, size=self.size)


class Draft(nn.Module):
    """Embeddings (B, E) → E[x0 | embedding] (B, C, s, s), in units of the scaled latent.

    Learned by squared error beside the diffusion, whose network then sees it joined to x_t: Grad-TTS's μ and its prior loss (Popov et al. 2021),
    for pictures. What a name looks like is thus remembered by a layer that is run once a prompt, not by one that is run at every position and step.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.embed_dim, config.width)
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers - 1))
        self.fc2 = nn.Linear(config.width, config.channels * config.size**2)

    def forward(self, embedding: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, s, s), or (B, C, *size) by bilinear interpolation where a latent of another size is asked for."""
        c = self.config
        x = F.gelu(self.fc1(embedding))
        for layer in self.hidden:
            x = F.gelu(layer(x))  # (B, width)
        x = self.fc2(x).view(-1, c.channels, c.size, c.size)
        return x if size in (None, (c.size, c.size)) else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
