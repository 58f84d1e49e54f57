"""Sets of images in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.analysis.metrics.features import FeatureExtractor


class Listed:
    """Images in memory as an `ImageSet`."""

    def __init__(self, name: str, pixels: Sequence[Tensor], captions: list[str] | None = None) -> None:
        self.name, self.pixels, self.texts = name, pixels, captions

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
        return (self.pixels[i] for i in (range(len(self)) if indices is None else indices))

    def captions(self) -> list[str] | None:
        return self.texts

    def labels(self) -> list[str]:
        return [f"{self.name} {i}" for i in range(len(self))]


class Means(FeatureExtractor):
    """The mean of each channel in each quarter of an image."""

    def __init__(self, *, is_clip: bool = False) -> None:
        super().__init__("means", "none", 12, is_clip=is_clip)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


def random_images(n: int, side: int = 8, *, seed: int = 0, light: float = 0.0) -> list[Tensor]:
    """Return n images (3, side, side) of random colours."""
    made = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return list((made + light).clamp(0, 1))
