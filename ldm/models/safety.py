"""The safety checker published with Stable Diffusion 1: a CLIP vision tower and vectors that pictures must
not come near to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.clip.towers import VisionConfig, VisionTower

SPECIAL_CARE = 0.01  # what a picture near a special vector has added to every score that follows


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """The shape of a checker; the defaults are the published one's (ViT-L/14, 17 concepts, 3 special
    ones)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    concepts: int = 17
    special: int = 3

    def __post_init__(self) -> None:
        if self.vision.embed_dim is None or self.concepts < 1 or self.special < 0:
            raise ValueError(f"expected a vision tower with projection and at least one concept, got {self}")


class SafetyChecker(nn.Module):
    """Pictures to whether they are flagged. ``black``: whether `hide` blackens the flagged ones; nothing is
    hidden unless asked."""

    def __init__(self, config: SafetyConfig, *, black: bool = False) -> None:
        super().__init__()
        self.config = config
        self.black = black
        width = config.vision.embed_dim or 0
        self.vision = VisionTower(config.vision)
        self.concept_embeds = nn.Parameter(torch.ones(config.concepts, width))
        self.concept_embeds_weights = nn.Parameter(torch.ones(config.concepts))  # the thresholds
        self.special_care_embeds = nn.Parameter(torch.ones(config.special, width))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(config.special))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[bool, ...]:
        """Pictures (B, 3, H, W) in [0, 1], seen in 8 bits as they will be stored → whether each is
        flagged."""
        pixels = (pixels * 255).round() / 255
        weight = self.vision.conv1.weight
        return self.flags(self.vision.prepare(pixels.to(weight.device)).to(weight.dtype))

    @torch.no_grad()
    def flags(self, prepared: Tensor) -> tuple[bool, ...]:
        """Prepared pixels (B, 3, S, S) → whether each is flagged: a concept's cosine exceeds its threshold,
        to three digits."""
        image = self.vision(prepared).pooled  # (B, E)
        special, concepts = (
            similarity(image, self.special_care_embeds),
            similarity(image, self.concept_embeds),
        )
        added = torch.zeros(len(image))
        for k, threshold in enumerate(
            self.special_care_embeds_weights.float().cpu()
        ):  # in order: one that is near counts for those after it
            near = torch.round(special[:, k] - threshold + added, decimals=3) > 0
            added = torch.where(near, SPECIAL_CARE, added)
        # (B, concepts)
        scores = torch.round(
            concepts - self.concept_embeds_weights.float().cpu() + added[:, None], decimals=3
        )
        return tuple(bool(flag) for flag in (scores > 0).any(dim=1))

    def hide(self, pixels: Tensor, flagged: Sequence[bool]) -> Tensor:
        """The pictures, the flagged ones black if ``black`` says so."""
        if not self.black or not any(flagged):
            return pixels
        return torch.where(torch.tensor(flagged)[:, None, None, None], torch.zeros_like(pixels), pixels)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of rows (B, E) and (K, E), (B, K) float32 on the CPU."""
    return (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).float().cpu()
