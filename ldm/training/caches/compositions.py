"""The cached compositions of a run, and the files that hold what a frozen network makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data import PALETTE, Composition, caption, held_out_pair
from ldm.data.index import ImageIndex
from ldm.support.arrays import read_sealed, write_array
from ldm.support.config import to_dict
from ldm.support.progress import progress_bar
from ldm.training.config import RunConfig
from ldm.training.images import TrainingImages

CACHES = Path("runs") / "latents"


@dataclass(frozen=True, kw_only=True)
class CachedCompositions:
    """The compositions whose latents and embeddings are computed once.

    Every training image of the mix on every background that training may show it on, then `variants` random
    small and double compositions of the mix.

    Args:
        images: The training images.
        rows: The compositions, in the order of the caches' rows.
        row_of: The row of each (image, background) at full size.
        variants: Number of small and double compositions at the end of `rows`.
        seed: Seed of the variants.
    """

    images: TrainingImages
    rows: tuple[Composition, ...]
    row_of: dict[tuple[int, str | None], int]
    variants: int
    seed: int

    @classmethod
    def of_run(cls, run: RunConfig, images: TrainingImages, variants: int) -> CachedCompositions:
        """Return the cached compositions of a run.

        Raises:
            ValueError: If the mix has small or double compositions and `variants` is 0, or the reverse.
        """
        mix = images.config.mix
        plain = [
            Composition(image=int(row), background=background)
            for row in images.data.train
            if getattr(mix, images.index[int(row)].style) > 0
            for background in (None, *(PALETTE if mix.background > 0 else ()))
            if background != "white" and not held_out_pair(images.index[int(row)].name, background)
        ]
        row_of = {(c.image, c.background): i for i, c in enumerate(plain)}
        # white renders alike whether the caption names it or not
        row_of.update({(c.image, "white"): i for i, c in enumerate(plain) if c.background is None})
        rows = (*plain, *draw_variants(images, variants, run.seed))
        return cls(images=images, rows=rows, row_of=row_of, variants=variants, seed=run.seed)

    def draw(self, rng: np.random.Generator, n: int) -> tuple[list[Composition], list[int]]:
        """Draw n cached compositions by the run's probabilities, and return them with their rows.

        A small or double composition is replaced by a random one of the variants.
        """
        chosen = [self._choose(composition, rng) for composition in self.images.draw(rng, n)]
        return [composition for composition, _ in chosen], [row for _, row in chosen]

    def _choose(self, composition: Composition, rng: np.random.Generator) -> tuple[Composition, int]:
        if composition.second is None and composition.size == "full":
            return composition, self.row_of[composition.image, composition.background]
        row = len(self.rows) - self.variants + int(rng.integers(self.variants))
        return self.rows[row], row

    def cached(
        self,
        kind: str,
        key: str,
        shape: tuple[int, ...],
        compute: Callable[[Sequence[Composition]], Tensor],
    ) -> np.ndarray:
        """Open the file of a network's outputs for all rows, after computing it if it is absent or damaged.

        Args:
            kind: First word of the file's name.
            key: Identifies the network's weights.
            shape: Shape of one row's output.
            compute: Maps B compositions to outputs (B, *shape).

        Returns:
            The outputs, (N, *shape) float16, memory-mapped.
        """
        return cached_rows(CACHES / f"{kind}-{self._digest(key)}.npy", self.rows, shape, compute)

    def _digest(self, key: str) -> str:
        """Return a hash of everything that the outputs of a network depend on."""
        # `drawn` decides how often a row is drawn, not which rows there are
        config = {name: value for name, value in to_dict(self.images.config).items() if name != "drawn"}
        content = [key, config, self.variants, self.seed, self.images.data.manifest]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def draw_variants(images: TrainingImages, n: int, seed: int) -> list[Composition]:
    """Draw n compositions of the mix that are small or double."""
    mix = images.config.mix
    if n and mix.small + mix.two == 0:
        raise ValueError(f"variants {n}: expected 0, as the mix has neither small nor double compositions")
    if not n and mix.small + mix.two > 0:
        raise ValueError("variants 0: expected at least 1, as the mix has small or double compositions")
    rng = np.random.default_rng(seed)
    drawn: list[Composition] = []
    while len(drawn) < n:
        drawn += [c for c in images.draw(rng, n, mix) if c.second is not None or c.size == "small"]
    return drawn[:n]


def draw_captions(
    compositions: Sequence[Composition], index: ImageIndex, rng: np.random.Generator, *, drop: float
) -> list[str]:
    """Draw a caption for each composition.

    Args:
        compositions: B compositions.
        index: The index of the data set.
        rng: The source of randomness.
        drop: Probability of the empty caption.
    """
    return ["" if rng.random() < drop else caption(c, index, rng) for c in compositions]


@torch.no_grad()
def cached_rows(
    path: Path,
    compositions: Sequence[Composition],
    shape: tuple[int, ...],
    compute: Callable[[Sequence[Composition]], Tensor],
    batch: int = 32,
) -> np.ndarray:
    """Return the outputs of `compute` for all compositions from a file, which is written if it is not intact.

    Args:
        path: The file. It ends with its SHA-256; it is written whole or not at all.
        compositions: N compositions.
        shape: Shape of one output.
        compute: Maps B compositions to outputs (B, *shape).
        batch: Compositions per call of `compute`. Default: 32.

    Returns:
        The outputs, (N, *shape) float16, memory-mapped.
    """
    whole = (len(compositions), *shape)
    found = read_sealed(path, whole, np.float16)
    if found is not None:
        return found
    starts = range(0, len(compositions), batch)
    bar = progress_bar(len(starts), iterable=starts, desc=f"compute {path.name}")
    blocks = (compute(compositions[start : start + batch]).half().cpu().numpy() for start in bar)
    write_array(path, whole, np.float16, blocks, sealed=True)
    return np.load(path, mmap_mode="r")
