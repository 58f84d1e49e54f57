"""Training images of the emoji data set: random scenes, and the scenes whose latents are cached."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ldm.data import (
    PALETTE,
    EmojiData,
    ImageIndex,
    Mix,
    Scene,
    caption,
    held_out_background,
    plain_scene,
    render_batch,
    sample_scene,
)
from ldm.data.captions import CaptionPieces, caption_nouns, caption_pieces, join_captions, vocabulary
from ldm.data.framing import SizeRecord
from ldm.data.index import INDEX_FILE
from ldm.data.mix import check_mix
from ldm.support.config import to_dict
from ldm.training.caches.rows import CACHES, cached_rows
from ldm.training.config import DataConfig, RunConfig
from ldm.training.draws import Draws
from ldm.training.images import to_tensor
from ldm.training.inputs.protocol import TrainingImages

CAPTION, VARIANT = 1, 2  # uses of a sample's generators; see `Draws.of_sample`
KNOWN_NAMES = (
    "red-apple",
    "cat-face",
    "snowman",
    "rocket",
    "grinning-face",
    "guitar",
    "sunflower",
    "fire-engine",
)


class EmojiImages:
    """The emoji data set as a training run sees it: random scenes of its images.

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

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return self.config.size

    def report(self) -> str:
        """Return an empty text: the data set is read whole or not at all."""
        return ""

    def sizes(self, samples: Sequence[Scene]) -> list[SizeRecord]:
        """Return the size conditions of scenes, which are rendered at their size."""
        side = (self.size, self.size)
        return [SizeRecord(original=side, crop=(0, 0), target=side) for _ in samples]

    def draw(self, draws: Draws) -> list[Scene]:
        """Draw scenes of a step, none of them held out, by the configuration's `drawn` or `mix`."""
        mix = self.config.drawn or self.config.mix
        return [sample_scene(draws.of_sample(i), self.index, mix) for i in draws.samples]

    def random(self, rng: np.random.Generator, n: int, mix: Mix | None = None) -> list[Scene]:
        """Draw n scenes, none of them held out, from one generator.

        Args:
            rng: The source of randomness.
            n: Number of scenes.
            mix: The probabilities; None for the configuration's `drawn`, or its `mix`. Default: None.
        """
        mix = mix or self.config.drawn or self.config.mix
        return [sample_scene(rng, self.index, mix) for _ in range(n)]

    def captions(self, samples: Sequence[Scene], draws: Draws, *, drop: float = 0.0) -> list[str]:
        """Draw a caption for each scene of a step; it is empty with probability `drop`."""
        return join_captions(self.pieces(samples, draws, drop=drop))

    def pieces(self, samples: Sequence[Scene], draws: Draws, *, drop: float = 0.0) -> list[CaptionPieces]:
        """Return the captions that `captions` draws, in pieces."""
        generators = (draws.of_sample(i, CAPTION) for i in draws.samples)
        return [
            [] if rng.random() < drop else caption_pieces(scene.facts, self.index, rng)
            for scene, rng in zip(samples, generators, strict=True)
        ]

    def describe(self, chosen: Sequence[Scene]) -> list[str]:
        """Return the canonical captions of scenes."""
        return [caption(scene.facts, self.index) for scene in chosen]

    def wordings(self, samples: Sequence[Scene], seed: int) -> list[str]:
        """Return a random caption of each scene, the same for the same seed."""
        keys = (zlib.crc32(text.encode()) for text in self.describe(samples))
        return [
            caption(scene.facts, self.index, np.random.default_rng([seed, key]))
            for scene, key in zip(samples, keys, strict=True)
        ]

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

    def on_backgrounds(self, samples: Sequence[Scene], colours: Sequence[str | None]) -> list[Scene]:
        """Return the whole images that samples show first, on backgrounds in turn."""
        return [
            plain_scene(self.index, scene.rows()[0], background)
            for scene, background in zip(samples, itertools.cycle(colours), strict=False)
        ]

    def held_out_pairs(self, samples: Sequence[Scene]) -> list[Scene]:
        """Return the whole images that samples show first, on each background that is held out for them."""
        return [
            plain_scene(self.index, row, background)
            for row in (scene.rows()[0] for scene in samples)
            for background in PALETTE
            if held_out_background(self.index[row].name, background)
        ]

    def tensor(self, scenes: Sequence[Scene]) -> Tensor:
        """Render scenes to (B, 3, H, W) float32 in [−1, 1]."""
        return to_tensor(render_batch(scenes, self.data.images, self.config.size))

    def prompts(self, n: int) -> list[str]:
        """Return n prompts: well-known and random names, half of them on a background."""
        rng = np.random.default_rng(3)
        names = [name for name in KNOWN_NAMES if name in self.index.rows_of]
        names += list(rng.choice(self.index.names(held_out=False), n - len(KNOWN_NAMES)))
        return [
            name.replace("-", " ") + (f" on a {background} background" if background else "")
            for name, background in zip(names, itertools.cycle([None, "blue", None, "yellow"]), strict=False)
        ]

    def texts(self) -> list[str]:
        """Return the words and the nouns of all captions of training images."""
        # nouns too: punctuation and joined words have tokens that no single word has
        return [*sorted(vocabulary(self.index)), *caption_nouns(self.index)]

    def cached(self, run: RunConfig, variants: int) -> CachedScenes:
        """Return the cached scenes of a run; see `CachedScenes.of_run`."""
        return CachedScenes.of_run(run, self, variants)


def emoji_only(images: TrainingImages, what: str) -> EmojiImages:
    """Return images as those of the emoji data set; ValueError if they are others, which names `what`."""
    if not isinstance(images, EmojiImages):
        raise ValueError(f"{what}: it reads scenes of the emoji data set: expected data.kind 'emoji'")
    return images


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

    images: EmojiImages
    rows: tuple[Scene, ...]
    row_of: dict[tuple[int, str | None], int]
    variants: int
    seed: int

    @classmethod
    def of_run(cls, run: RunConfig, images: EmojiImages, variants: int) -> CachedScenes:
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
    def random(cls, run: RunConfig, images: EmojiImages, n: int) -> CachedScenes:
        """Return n random scenes of the mix, plain ones among them."""
        rows = tuple(images.random(np.random.default_rng(run.seed), n, images.config.mix))
        return cls(images=images, rows=rows, row_of={}, variants=n, seed=run.seed)

    def draw(self, draws: Draws) -> tuple[list[Scene], list[int]]:
        """Draw cached scenes of a step by the run's probabilities, and return them with their rows.

        A plain scene is replaced by that of its whole image, another one by a random one of the variants.
        """
        generators = (draws.of_sample(i, VARIANT) for i in draws.samples)
        chosen = [
            self._choose(scene, rng) for scene, rng in zip(self.images.draw(draws), generators, strict=True)
        ]
        return [scene for scene, _ in chosen], [row for _, row in chosen]

    def _choose(self, scene: Scene, rng: np.random.Generator) -> tuple[Scene, int]:
        if scene.facts.is_plain:
            row = self.row_of[scene.rows()[0], scene.facts.background]
            return replace(scene, placements=self.rows[row].placements), row
        row = len(self.rows) - self.variants + int(rng.integers(self.variants))
        return self.rows[row], row

    def rows_of(self, samples: Sequence[Scene]) -> list[int]:
        """Return the rows of whole images on their backgrounds."""
        return [self.row_of[scene.rows()[0], scene.facts.background] for scene in samples]

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
        # `drawn` decides how often a row is drawn, not which rows there are; `kind` is always the same
        left_out = ("drawn", "kind")
        config = {name: value for name, value in to_dict(self.images.config).items() if name not in left_out}
        content = [key, config, self.variants, self.seed, self.images.data.manifest]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def draw_variants(images: EmojiImages, n: int, seed: int) -> list[Scene]:
    """Draw n scenes of the mix that are not plain."""
    mix = images.config.mix
    if n and mix.is_plain:
        raise ValueError(f"variants {n}: expected 0, as all scenes of the mix are plain")
    if not n and not mix.is_plain:
        raise ValueError("variants 0: expected at least 1, as the mix has scenes that are not plain")
    rng = np.random.default_rng(seed)
    drawn: list[Scene] = []
    while len(drawn) < n:
        drawn += [c for c in images.random(rng, n, mix) if not c.facts.is_plain]
    return drawn[:n]
