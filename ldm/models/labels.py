"""Classes as conditions: one learned token each (Rombach et al. 2022, section 4.3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ldm.diffusion.cond import Cond


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """``classes`` tokens of a ``width``; where the model knows an unconditional class (cin256-v2: the last),
    it is one of them."""

    classes: int = 1001
    width: int = 512

    def __post_init__(self) -> None:
        if self.classes < 1 or self.width < 1:
            raise ValueError(f"classes and width: expected at least 1, got {self.classes} and {self.width}")


class LabelConditioner(nn.Module):
    """Classes in, `Cond` out."""

    def __init__(self, config: LabelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.classes, config.width)

    def forward(self, labels: Sequence[int]) -> Cond:
        """The condition of B classes: a context of one token, (B, 1, D); ValueError for a class that there is
        not."""
        for label in labels:
            if not 0 <= label < self.config.classes:
                raise ValueError(f"class {label}: expected 0 to {self.config.classes - 1}")
        ids = torch.tensor(list(labels), device=self.embedding.weight.device, dtype=torch.long)
        return Cond(context=self.embedding(ids)[:, None])

    def unknown(self, prompt: str) -> list[str]:
        """The words that the model has never seen: it takes none."""
        return []

    def networks(self) -> dict[str, nn.Module]:
        """The table, as "class"."""
        return {"class": self}
