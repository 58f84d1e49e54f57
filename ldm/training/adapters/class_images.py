"""Prior preservation: images that a model draws of a class before its training, and keeps drawing.

The loss gets the term λ · L(class images) beside L(training images) (Ruiz et al. 2022, arXiv:2208.12242,
eq. 2), so that "dog" does not become the one dog of the training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.pipelines.latent import LatentDiffusion
from ldm.training.caches.pairs import teacher_pairs
from ldm.training.config import check_at_least
from ldm.training.draws import Draws

STREAM = 2  # of the random numbers of class images


@dataclass(frozen=True, kw_only=True)
class PriorPreservation:
    """The images of a class that a model keeps drawing.

    Args:
        prompt: Prompt of the class, such as "a photo of a dog".
        images: Number of images; the model draws them once, before its training. Default: 100.
        weight: λ, the weight of their loss. Default: 1.
        steps: Sampling steps; None for the model's own. Default: None.
        guidance: Guidance scale; None for the model's own. Default: None.
    """

    prompt: str
    images: int = 100
    weight: float = 1.0
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        check_at_least(1, images=self.images)
        check_at_least(0, weight=self.weight)


class ClassImages:
    """Latents that a model drew of a class; image i has seed i.

    Args:
        config: The class, and how its images are drawn.
        pipe: The model, before its training.
        size: Side of the images.

    Raises:
        ValueError: If the model reads no prompts.
    """

    def __init__(self, config: PriorPreservation, pipe: LatentDiffusion, size: int) -> None:
        if pipe.text is None:
            raise ValueError(f"prior: {pipe.name!r} reads no prompts, expected a model of texts")
        options: dict[str, Any] = {"height": size, "width": size}
        options |= {} if config.steps is None else {"steps": config.steps}
        options |= {} if config.guidance is None else {"guidance": config.guidance}
        self.config = config
        self.pairs = teacher_pairs(pipe, [config.prompt] * config.images, **options)

    def draws(self, draws: Draws) -> Draws:
        """Return the draws of class images for those of a batch."""
        return draws.in_stream(STREAM)

    def rows(self, draws: Draws) -> list[int]:
        """Draw the numbers of class images, which are their seeds."""
        return [int(row) for row in draws.integers(self.config.images)]

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Return latents (B, C, h, w) float32 on the CPU."""
        return self.pairs.latent(rows)
