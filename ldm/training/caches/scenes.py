"""The cached scenes of a run, and the files that hold what a frozen network makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data import PALETTE, Scene, caption, held_out_background, plain_scene
from ldm.data.index import ImageIndex
from ldm.support.arrays import read_sealed, write_array
from ldm.support.config import to_dict
from ldm.support.progress import progress_bar
from ldm.training.config import RunConfig
from ldm.training.images import TrainingImages

CACHES = Path("runs") / "latents"


@dataclass(frozen=True, kw_only=True)
class CachedScenes:
    """The scenes whose latents and embeddings are computed once.

    Every training image of the mix, whole, on every background that training may show it on, then `variants`
    random scenes of the mix that are not plain (see `Facts.is_plain`).

    Args:
        images: The training images.
        rows: The scenes, in the order of the caches' rows.
        row_of: The row of each whole image on each background, by (row of the image, background).
        variants: Number of scenes that are not plain, at the end of `rows`.
        seed: Seed of the variants.
    """

    images: TrainingImages
    rows: tuple[Scene, ...]
    row_of: dict[tuple[int, str | None], int]
    variants: int
    seed: int

    @classmethod
    def of_run(cls, run: RunConfig, images: TrainingImages, variants: int) -> CachedScenes:
        """Return the cached scenes of a run.

        Raises:
            ValueError: If the mix has scenes that are not plain and `variants` is 0, or the reverse.
        """
        mix = images.config.mix
        plain = [
            plain_scene(images.index, int(row), background)
            for row in images.data.train
            if mix.styles.get(images.index[int(row)].style, 0) > 0
            for background in (None, *(PALETTE if mix.background > 0 else ()))
            if background != "white" and not held_out_background(images.index[int(row)].name, background)
        ]
        row_of = {(c.rows()[0], c.facts.background): i for i, c in enumerate(plain)}
        # white renders alike whether the caption names it or not
        row_of.update({(row, "white"): i for (row, background), i in row_of.items() if background is None})
        rows = (*plain, *draw_variants(images, variants, run.seed))
        return cls(images=images, rows=rows, row_of=row_of, variants=variants, seed=run.seed)

    @classmethod
    def random(cls, run: RunConfig, images: TrainingImages, n: int) -> CachedScenes:
        """Return n random scenes of the mix, plain ones among them."""
        rows = tuple(images.draw(np.random.default_rng(run.seed), n, images.config.mix))
        return cls(images=images, rows=rows, row_of={}, variants=n, seed=run.seed)

    def draw(self, rng: np.random.Generator, n: int) -> tuple[list[Scene], list[int]]:
        """Draw n cached scenes by the run's probabilities, and return them with their rows.

        A plain scene is replaced by that of its whole image, another one by a random one of the variants.
        """
        chosen = [self._choose(scene, rng) for scene in self.images.draw(rng, n)]
        return [scene for scene, _ in chosen], [row for _, row in chosen]

    def _choose(self, scene: Scene, rng: np.random.Generator) -> tuple[Scene, int]:
        if scene.facts.is_plain:
            row = self.row_of[scene.rows()[0], scene.facts.background]
            return replace(scene, placements=self.rows[row].placements), row
        row = len(self.rows) - self.variants + int(rng.integers(self.variants))
        return self.rows[row], row

    def cached(
        self,
        kind: str,
        key: str,
        shape: tuple[int, ...],
        compute: Callable[[Sequence[Scene]], Tensor],
    ) -> np.ndarray:
        """Open the file of a network's outputs for all rows, after computing it if it is absent or damaged.

        Args:
            kind: First word of the file's name.
            key: Identifies the network's weights.
            shape: Shape of one row's output.
            compute: Maps B scenes to outputs (B, *shape).

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


def draw_variants(images: TrainingImages, n: int, seed: int) -> list[Scene]:
    """Draw n scenes of the mix that are not plain."""
    mix = images.config.mix
    if n and mix.is_plain:
        raise ValueError(f"variants {n}: expected 0, as all scenes of the mix are plain")
    if not n and not mix.is_plain:
        raise ValueError("variants 0: expected at least 1, as the mix has scenes that are not plain")
    rng = np.random.default_rng(seed)
    drawn: list[Scene] = []
    while len(drawn) < n:
        drawn += [c for c in images.draw(rng, n, mix) if not c.facts.is_plain]
    return drawn[:n]


def draw_captions(
    scenes: Sequence[Scene], index: ImageIndex, rng: np.random.Generator, *, drop: float
) -> list[str]:
    """Draw a caption for each scene.

    Args:
        scenes: B scenes.
        index: The index of the data set.
        rng: The source of randomness.
        drop: Probability of the empty caption.
    """
    return ["" if rng.random() < drop else caption(c.facts, index, rng) for c in scenes]


@torch.no_grad()
def cached_rows(
    path: Path,
    scenes: Sequence[Scene],
    shape: tuple[int, ...],
    compute: Callable[[Sequence[Scene]], Tensor],
    batch: int = 32,
) -> np.ndarray:
    """Return the outputs of `compute` for all scenes from a file, which is written if it is not intact.

    Args:
        path: The file. It ends with its SHA-256; it is written whole or not at all.
        scenes: N scenes.
        shape: Shape of one output.
        compute: Maps B scenes to outputs (B, *shape).
        batch: Scenes per call of `compute`. Default: 32.

    Returns:
        The outputs, (N, *shape) float16, memory-mapped.
    """
    whole = (len(scenes), *shape)
    found = read_sealed(path, whole, np.float16)
    if found is not None:
        return found
    starts = range(0, len(scenes), batch)
    bar = progress_bar(len(starts), iterable=starts, desc=f"compute {path.name}")
    blocks = (compute(scenes[start : start + batch]).half().cpu().numpy() for start in bar)
    write_array(path, whole, np.float16, blocks, sealed=True)
    return np.load(path, mmap_mode="r")
