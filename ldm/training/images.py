"""Training images: random scenes, rendered and converted to tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ldm.data import (
    PALETTE,
    EmojiData,
    ImageIndex,
    Mix,
    Scene,
    caption,
    plain_scene,
    render_batch,
    sample_scene,
)
from ldm.data.index import INDEX_FILE
from ldm.data.mix import check_mix
from ldm.training.config import DataConfig


class TrainingImages:
    """The data set as a training run sees it.

    Args:
        config: The folder and the mix.
        validates_held_out: Whether the run validates on held-out images. Default: False.

    Raises:
        FileNotFoundError: If the data set is absent.
        ValueError: If the data set is damaged, has no training image, does not allow the scenes of the mix
            (see `check_mix`), or has no held-out image where the run needs some.
    """

    def __init__(self, config: DataConfig, *, validates_held_out: bool = False) -> None:
        self.config = config
        self.data = EmojiData.open(config.folder)
        if not len(self.data.train):
            raise ValueError(f"data.folder {config.folder!r}: all {len(self.data)} images are held out")
        if validates_held_out and not len(self.data.held_out):
            raise ValueError(
                f"data.folder {config.folder!r}: none of the {len(self.data)} images is held out, and this"
                f' part validates on such images: set "held_out" to true for some rows of {INDEX_FILE}'
            )
        for key, mix in (("mix", config.mix), ("drawn", config.drawn)):
            try:
                if mix is not None:
                    check_mix(mix, self.index)
            except ValueError as error:
                raise ValueError(f"data.{key} of {config.folder!r}: {error}") from None

    @property
    def index(self) -> ImageIndex:
        """The index of the data set."""
        return self.data.index

    def draw(self, rng: np.random.Generator, n: int, mix: Mix | None = None) -> list[Scene]:
        """Draw n scenes, none of them held out.

        Args:
            rng: The source of randomness.
            n: Number of scenes.
            mix: The probabilities; None for the configuration's `drawn`, or its `mix`. Default: None.
        """
        mix = mix or self.config.drawn or self.config.mix
        return [sample_scene(rng, self.index, mix) for _ in range(n)]

    def describe(self, chosen: Sequence[Scene]) -> list[str]:
        """Return the canonical captions of scenes."""
        return [caption(scene.facts, self.index) for scene in chosen]

    def held_out(self, n: int) -> list[Scene]:
        """Return n held-out images, the same at every call, every second one on a random background."""
        rng = np.random.default_rng(20)
        rows = rng.permutation(self.data.held_out)[:n]
        backgrounds = rng.choice(list(PALETTE), size=len(rows))
        return [
            plain_scene(self.index, int(row), str(background) if i % 2 else None)
            for i, (row, background) in enumerate(zip(rows, backgrounds, strict=True))
        ]

    def plain_rows(self) -> np.ndarray:
        """Return the rows of the training images of the style that the mix has most of, (n,) int."""
        styles = self.config.mix.styles
        return max(self.index.train_of.items(), key=lambda item: bool(len(item[1])) * styles.get(item[0], 0))[
            1
        ]

    def plain(self, n: int, seed: int) -> list[Scene]:
        """Return n of the `plain_rows` at random, whole, on white and without repeats."""
        rows = np.random.default_rng(seed).permutation(self.plain_rows())[:n]
        return [plain_scene(self.index, int(row)) for row in rows]

    def tensor(self, scenes: Sequence[Scene]) -> Tensor:
        """Render scenes to (B, 3, H, W) float32 in [−1, 1]."""
        return to_tensor(render_batch(scenes, self.data.images, self.config.size))


def to_tensor(images: np.ndarray) -> Tensor:
    """Convert (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [−1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_uint8(x: Tensor) -> np.ndarray:
    """Convert (B, 3, H, W) in [−1, 1] to (B, H, W, 3) uint8; values outside the range are clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange (B, H, W, 3) images row by row in one image, on white."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, c), 255, dtype=np.uint8)
    sheet[:n] = images
    return rearrange(sheet, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)


def comparison_grid(*versions: Tensor, columns: int) -> np.ndarray:
    """Arrange versions (B, 3, H, W) of the same images side by side in one image, (H', W', 3) uint8."""
    interleaved = torch.stack([version.cpu() for version in versions], 1).flatten(0, 1)
    return image_grid(to_uint8(interleaved), columns)
