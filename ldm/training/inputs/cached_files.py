"""Images of files whose latents and embeddings are computed once and kept on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.dataset import Problem
from ldm.data.order import Order
from ldm.support.progress import progress_bar
from ldm.training.caches.rows import CACHES
from ldm.training.caches.shares import own_share, wait_for_others
from ldm.training.caches.store import NOTHING, TensorStore, fill
from ldm.training.draws import Draws
from ldm.training.inputs.file_set import FileSet
from ldm.training.inputs.protocol import TrainingImages
from ldm.training.inputs.reading import ImageSample, Reader, Reading, read_ahead

PIXELS = 1 << 18  # of the images that a network reads at a time
MOST_AT_ONCE = 32  # images that a network reads at a time


class CachedFiles:
    """Training images, each in one frame, whose latents and embeddings are computed once.

    What a network makes of an image is stored under a hash of the file's name, size and time of change, and
    of the frame. An interrupted computation goes on where it was. Images that are new or have changed are
    computed, and nothing else. Several processes divide the images.

    Args:
        images: The training images.
        files: Their files.
        seed: Seed of the run.
    """

    def __init__(self, images: TrainingImages, files: FileSet, seed: int) -> None:
        self.images, self.files, self.seed = images, files, seed
        self.row_of = {item: row for row, item in enumerate(files.train.tolist())}
        self._absent: set[int] = set()  # rows of broken files

    @property
    def rows(self) -> list[ImageSample]:
        """All cached samples."""
        return [self.sample(row) for row in range(len(self.row_of))]

    def sample(self, row: int) -> ImageSample:
        """Return a cached sample; its frame depends on the image's name alone."""
        item = int(self.files.train[row])
        key = hashlib.sha256(self.files.dataset.record(item).name.encode("utf-8", "surrogatepass")).digest()
        rng = np.random.default_rng(list(key[:8]))
        frame = self.files.reader.draw_frame(int(self.files.bucket_of[item]), rng)
        return ImageSample(item=item, frame=frame)

    @property
    def present(self) -> list[int]:
        """The rows of the images that can be decoded, as far as that is known."""
        return [row for row in range(len(self.row_of)) if row not in self._absent]

    @cached_property
    def order(self) -> Order:
        """The order in which a run shows the cached images; it is settled when all caches are filled."""
        kept = np.array(self.present, dtype=np.int64)
        if not len(kept):
            raise ValueError(f"data.path {self.files.config.path!r}: no image can be decoded")
        return self.files.ordered(self.files.train[kept])

    def draw(self, draws: Draws) -> tuple[list[ImageSample], list[int]]:
        """Return samples of a step and their rows."""
        rows = [self.row_of[self.order.item(index)[1]] for index in draws.samples]
        return [self.sample(row) for row in rows], rows

    def rows_of(self, samples: Sequence[ImageSample]) -> list[int]:
        """Return the rows of training images."""
        return [self.row_of[sample.item] for sample in samples]

    def cached(
        self,
        kind: str,
        key: str,
        shape: tuple[int, ...],
        compute: Callable[[Sequence[ImageSample]], Tensor],
    ) -> StoredRows:
        """Return a network's outputs for all rows, after computing those that no file holds.

        Args:
            kind: First word of the folder's name.
            key: Identifies the network's weights.
            shape: Not read: each frame has a shape of its own.
            compute: Maps B samples of one size to outputs (B, *shape).
        """
        config = self.files.config
        about = hashlib.sha256(f"{key}/{config.size}/{config.background}".encode()).hexdigest()[:16]
        store = TensorStore(CACHES / f"{kind}-{about}")
        keys = [self.key(row) for row in range(len(self.row_of))]
        missing = [row for row in own_share(range(len(keys))) if keys[row] not in store]
        if missing:
            fill(store, self._computed(missing, keys, compute, f"compute {store.folder.name}"))
        wait_for_others()
        store.refresh()
        marked = {row for row, name in enumerate(keys) if not store.has_content(name)}
        names = (self.files.dataset.record(self.sample(row).item).name for row in sorted(marked))
        self.files.note(Problem(name, "unreadable", "it could not be decoded") for name in names)
        self._absent |= marked
        return StoredRows(store, keys)

    def key(self, row: int) -> str:
        """Return the key of a row in every store."""
        return self.files.key(self.sample(row))

    @torch.no_grad()
    def _computed(
        self,
        rows: Sequence[int],
        keys: Sequence[str],
        compute: Callable[[Sequence[ImageSample]], Tensor],
        name: str,
    ) -> Iterator[dict[str, Tensor]]:
        """Compute rows, in parts of one size, and give the outputs of each part by key."""
        parts = self._parts(rows)
        readings = read_ahead(_OfPart(self.files.reader, parts), range(len(parts)), self.files.config.workers)
        for number, reading in enumerate(progress_bar(len(parts), iterable=readings, desc=name)):
            self.files.note(reading.broken)
            wanted = [keys[self.row_of[sample.item]] for sample in parts[number]]
            names = [keys[self.row_of[item]] for item in reading.items]
            made = dict(zip(names, compute(reading.samples()), strict=True)) if names else {}
            yield {name: made.get(name, NOTHING) for name in wanted}

    def _parts(self, rows: Sequence[int]) -> list[list[ImageSample]]:
        """Return samples in parts of one size, as many as a network reads at a time."""
        sizes: dict[tuple[int, int], list[ImageSample]] = {}
        for sample in map(self.sample, rows):
            sizes.setdefault(sample.frame[:2], []).append(sample)
        parts = []
        for (height, width), samples in sizes.items():
            n = max(1, min(MOST_AT_ONCE, PIXELS // (height * width)))
            parts += [samples[i : i + n] for i in range(0, len(samples), n)]
        return parts


@dataclass(frozen=True)
class _OfPart:
    """Reads a part of the cached samples by its number."""

    reader: Reader
    parts: list[list[ImageSample]]

    def __call__(self, number: int) -> Reading:
        return self.reader.read_all(self.parts[number])


class StoredRows:
    """Rows of a store, as an array would give them.

    Args:
        store: The store.
        keys: The key of each row.
    """

    def __init__(self, store: TensorStore, keys: Sequence[str]) -> None:
        self.store, self.keys = store, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Any) -> np.ndarray:  # a slice or whole numbers, as NumPy's
        """Return the outputs of rows, (B, *shape) float16; of a slice, those that are not absent."""
        numbers = np.arange(len(self.keys))[rows]
        if isinstance(rows, slice):
            numbers = np.array(
                [row for row in numbers if self.store.has_content(self.keys[row])], dtype=np.int64
            )
        return np.stack([self.store[self.keys[row]] for row in numbers])
