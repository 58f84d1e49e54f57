"""Class labels as conditions: one learned token per class (Rombach et al. 2022, section 4.3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ldm.diffusion.cond import Cond


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Shape of a `LabelConditioner`.

    Args:
        classes: Number of classes, including the unconditional one if the model has one (cin256-v2: the last
            class). Default: 1001.
        width: Width D of a token. Default: 512.

    Raises:
        ValueError: If a number is below 1.
    """

    classes: int = 1001
    width: int = 512

    def __post_init__(self) -> None:
        if self.classes < 1 or self.width < 1:
            raise ValueError(f"classes and width: expected at least 1, got {self.classes} and {self.width}")


class LabelConditioner(nn.Module):
    """Conditioner from class labels to `Cond`."""

    def __init__(self, config: LabelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.classes, config.width)

    def forward(self, labels: Sequence[int]) -> Cond:
        """Return the condition of B classes: a context of one token, (B, 1, D).

        Raises:
            ValueError: If a class is out of range.
        """
        for label in labels:
            if not 0 <= label < self.config.classes:
                raise ValueError(f"class {label}: expected 0 to {self.config.classes - 1}")
        ids = torch.tensor(list(labels), device=self.embedding.weight.device, dtype=torch.long)  # (B,)
        return Cond(context=self.embedding(ids)[:, None])

    def unknown(self, prompt: str) -> list[str]:
        """Return no words: the model reads no prompts, so that no word is unknown."""
        return []

    def networks(self) -> dict[str, nn.Module]:
        """Return the embedding table under the name "class"."""
        return {"class": self}
