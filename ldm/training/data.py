"""Pictures for training: compositions drawn, rendered, and turned into tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.data import PALETTE, Composition, EmojiData, render_batch, sample_composition
from ldm.data.mix import Mix
from ldm.training.config import DataConfig


class Pictures:
    """The data set as a training run sees it."""

    palette = PALETTE

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.data = EmojiData.open(config.folder)

    def draw(self, rng: np.random.Generator, n: int, mix: Mix | None = None) -> list[Composition]:
        """n compositions in the shares of a mix, by default the one that the configuration draws by; none is
        held out."""
        mix = mix or self.config.drawn or self.config.mix
        return [sample_composition(rng, self.data.index, mix) for _ in range(n)]

    def tensor(self, compositions: Sequence[Composition]) -> Tensor:
        """Their pictures, (B, 3, H, W) float32 in [−1, 1]."""
        return to_tensor(render_batch(compositions, self.data.images, self.config.size))


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [−1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_uint8(x: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [−1, 1] to (B, H, W, 3) uint8, for looking at: what is out of range is clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def picture_grid(pictures: np.ndarray, columns: int) -> np.ndarray:
    """(B, H, W, 3) pictures side by side, row by row, on white."""
    n, h, w, c = pictures.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, c), 255, dtype=np.uint8)
    sheet[:n] = pictures
    return sheet.reshape(rows, columns, h, w, c).transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, c)
