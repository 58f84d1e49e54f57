"""The safety checker published with Stable Diffusion 1.

A CLIP vision tower embeds an image; the image is flagged if its embedding is close to one of the concepts'
embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.clip.config import VisionConfig
from ldm.models.clip.towers import VisionTower
from ldm.support.device import computing_dtype

SPECIAL_CARE = 0.01  # added to the later scores of an image that is close to a special-care embedding


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Shape of a safety checker; the defaults are those of the published one, with a ViT-L/14.

    Args:
        vision: Shape of the vision tower, which must have a projection.
        concepts: Number of concepts. Default: 17.
        special: Number of special-care embeddings. Default: 3.

    Raises:
        ValueError: If the tower has no projection, or a number is out of range.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    concepts: int = 17
    special: int = 3

    def __post_init__(self) -> None:
        if self.vision.embed_dim is None or self.concepts < 1 or self.special < 0:
            raise ValueError(f"expected a vision tower with projection and at least one concept, got {self}")


class SafetyChecker(nn.Module):
    """Network that flags images.

    Args:
        config: Shape of the checker.
        black: Whether `hide` replaces flagged images by black ones. Default: False.

    Attributes:
        origin: SHA-256 of the files of its weights, for recipes; empty if they are not from files.
    """

    def __init__(self, config: SafetyConfig, *, black: bool = False) -> None:
        super().__init__()
        self.config = config
        self.black = black
        self.origin: Mapping[str, str] = {}
        width = config.vision.embed_dim or 0
        self.vision = VisionTower(config.vision)
        self.concept_embeds = nn.Parameter(torch.ones(config.concepts, width))
        self.concept_embeds_weights = nn.Parameter(torch.ones(config.concepts))  # the thresholds
        self.special_care_embeds = nn.Parameter(torch.ones(config.special, width))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(config.special))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[bool, ...]:
        """Return whether each image is flagged.

        Args:
            pixels: Images in [0, 1], shape (B, 3, H, W). They are rounded to 8 bits, as they will be stored.
        """
        pixels = (pixels * 255).round() / 255  # (B, 3, H, W)
        prepared = self.vision.prepare(pixels.to(self.vision.conv1.weight.device))  # (B, 3, S, S)
        return self.flags(prepared.to(computing_dtype(self.vision)))

    @torch.no_grad()
    def flags(self, prepared: Tensor) -> tuple[bool, ...]:
        """Return whether each image is flagged.

        The score of a concept is its cosine with the image minus its threshold, rounded to three decimals; an
        image is flagged if a score is above 0. Special-care embeddings are compared first: a match adds
        `SPECIAL_CARE` to all scores after it.

        Args:
            prepared: Pixels from `VisionTower.prepare`, shape (B, 3, S, S).
        """
        image = self.vision(prepared).pooled  # (B, E)
        special = pairwise_cosines(image, self.special_care_embeds)  # (B, special)
        concepts = pairwise_cosines(image, self.concept_embeds)  # (B, concepts)
        added = torch.zeros(len(image), device="cpu", dtype=torch.float32)
        # in order: a match raises the scores of the embeddings after it
        for k, threshold in enumerate(self.special_care_embeds_weights.float().cpu()):
            near = torch.round(special[:, k] - threshold + added, decimals=3) > 0  # (B,)
            added = torch.where(near, SPECIAL_CARE, added)  # (B,)
        scores = torch.round(
            concepts - self.concept_embeds_weights.float().cpu() + added[:, None], decimals=3
        )  # (B, concepts)
        return tuple(bool(flag) for flag in (scores > 0).any(dim=1))

    def hide(self, pixels: Tensor, flagged: Sequence[bool]) -> Tensor:
        """Return the images (B, 3, H, W) with flagged ones black if `black` is True, else unchanged."""
        if not self.black or not any(flagged):
            return pixels
        return torch.where(
            torch.tensor(flagged, device=pixels.device)[:, None, None, None], torch.zeros_like(pixels), pixels
        )


def pairwise_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines (B, K) of rows a (B, E) and b (K, E), in float32 on the CPU."""
    return (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).float().cpu()
