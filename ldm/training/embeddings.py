"""CLIP's embeddings of compositions and captions, for the parts of unCLIP in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning.clip import ClipPair
from ldm.conditioning.conditioner import TextConditioner
from ldm.data import Composition, caption
from ldm.models.clip.towers import VisionConfig, VisionTower
from ldm.training.compositions import Compositions
from ldm.training.config import RunConfig
from ldm.training.data import Pictures
from ldm.training.imagined import Imagined
from ldm.training.latents import CACHES, cache_name, write_rows
from ldm.weights.formats.ldm_folder import EMOJI_TEXT, about_part, read_part, read_text


def read_clip(text: str | Path | None, vision: str | Path, *, length: int | None = None) -> ClipPair:
    """The CLIP of two folders (``text`` None: its image tower alone), frozen, reading texts at a length
    (None: that of the longest in a batch).

    Its name holds the hash of its vision tower: that tells two trainings apart.
    """
    tower, _ = read_part(vision, "vision", VisionConfig, VisionTower)
    assert isinstance(tower, VisionTower)
    conditioner = None
    if text is not None:
        read = read_text(text)
        conditioner = TextConditioner(
            read.tower, read.tokenizer, replace(EMOJI_TEXT, length=length), read.words
        )
    return ClipPair(clip_name(vision), text=conditioner, vision=tower).eval().requires_grad_(False)


def clip_name(vision: str | Path) -> str:
    """What a CLIP trained here is called: after its vision tower's hash."""
    return f"emoji-clip/{about_part(vision, 'vision')['sha256'][:12]}"


@dataclass(frozen=True)
class EmbeddingCache:
    """The image embeddings of all compositions that are kept, (N, E) float16, memory-mapped; and as many that
    a prior makes, of which ``share`` are drawn."""

    vectors: np.ndarray
    compositions: Compositions
    imagined: np.ndarray | None = None
    share: float = 0.0

    @classmethod
    def of_run(
        cls,
        run: RunConfig,
        pictures: Pictures,
        clip: ClipPair,
        variants: int,
        imagined: Imagined | None = None,
    ) -> EmbeddingCache:
        """The cache of a run, shared by all that have its pictures, seed and CLIP (and prior, which reads a
        caption of each composition by ``clip``); computed if it is not there."""
        compositions = Compositions.of(pictures, variants=variants, seed=run.seed)

        def computed(key: str, compute: Callable[[Sequence[Composition]], Tensor]) -> np.ndarray:
            path = CACHES / f"embeddings-{cache_name(pictures, variants, run.seed, key)}.npy"
            if not path.exists():
                write_rows(path, compositions.rows, (clip.width,), compute)
            return np.load(path, mmap_mode="r")

        own = computed(clip.name, lambda part: embed(clip, pictures, part))
        if imagined is None:
            return cls(own, compositions)
        made, rng = imagined.maker(clip), np.random.default_rng(run.seed)
        from_text = computed(
            imagined.key, lambda part: made([caption(c, pictures.data.index, rng) for c in part])
        )
        return cls(own, compositions, from_text, imagined.share)

    def choose(self, composition: Composition, rng: np.random.Generator) -> tuple[Composition, int]:
        """See `Compositions.choose`."""
        return self.compositions.choose(composition, rng)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """The embeddings (B, E) float32 of rows, the pictures' own."""
        return torch.from_numpy(self.vectors[np.asarray(rows)]).float()

    def draw(self, rows: Sequence[int], rng: np.random.Generator) -> Tensor:
        """The embeddings (B, E) float32 of rows, each the picture's own or, by ``share``, the prior's."""
        own = self[rows]
        if self.imagined is None:
            return own
        chosen = torch.from_numpy(rng.random(len(rows)) < self.share)
        return torch.where(chosen[:, None], torch.from_numpy(self.imagined[np.asarray(rows)]).float(), own)


def caption_embeddings(
    run: RunConfig, pictures: Pictures, clip: ClipPair, variants: int, text: str | Path
) -> np.ndarray:
    """The text embeddings of each kept composition's plain caption and of one that is drawn, (N, 2, E)
    float16, memory-mapped; computed if they are not there. ``text``: the folder of the tower by which
    ``clip`` reads.
    """
    path = (
        CACHES
        / f"captions-{cache_name(pictures, variants, run.seed, about_part(text, 'text')['sha256'])}.npy"
    )
    if not path.exists():
        index, rng = pictures.data.index, np.random.default_rng(run.seed)

        def compute(part: Sequence[Composition]) -> Tensor:
            captions = [words for c in part for words in (caption(c, index), caption(c, index, rng))]
            return clip.text_embedding(captions).vector.view(len(part), 2, -1)

        write_rows(
            path, Compositions.of(pictures, variants=variants, seed=run.seed).rows, (2, clip.width), compute
        )
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def embed(
    clip: ClipPair, pictures: Pictures, compositions: Sequence[Composition], *, batch: int = 64
) -> Tensor:
    """The image embeddings of compositions, (B, E) float32, not of length 1."""
    parts = [compositions[i : i + batch] for i in range(0, len(compositions), batch)]
    return torch.cat(
        [clip.image_embedding(((pictures.tensor(part) + 1) / 2).clamp(0, 1)).vector for part in parts]
    )


def embedding_statistics(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, E) of embeddings (N, E), the latter at least a thousandth of the mean one."""
    mean, std = embeddings.mean(0, keepdim=True), embeddings.std(0, keepdim=True)
    return mean, std.clamp_min(1e-3 * float(std.mean()) + 1e-8)
