"""The order of training: which image a global sample index shows.

Batch k of size B consists of the indices k·B … k·B + B − 1, and all its images are of one bucket, as a batch
has one size. Within a bucket the images come in random permutations, one after the other, without gaps: each
image is shown once before any is shown again. Over one cycle each bucket has as many batches as its images
fill; their order is random. Every permutation is keyed by (seed, bucket, number), so that any index is looked
up without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

CYCLE = 1 << 32  # stands for a bucket in the keys of cycles


class Order:
    """The order in which the images of buckets are shown.

    Args:
        buckets: The images' numbers in each bucket; empty buckets are left out.
        batch: B, the global size of a batch.
        seed: The run's seed.

    Raises:
        ValueError: If there is no image.
    """

    def __init__(self, buckets: Sequence[np.ndarray], batch: int, seed: int) -> None:
        self.buckets = {b: items for b, items in enumerate(buckets) if len(items)}
        if not self.buckets:
            raise ValueError("expected at least one image")
        self.batch, self.seed = batch, seed
        self.filled = {b: -(-len(items) // batch) for b, items in self.buckets.items()}  # batches per cycle
        self._cycle = lru_cache(maxsize=4)(self._make_cycle)
        self._permutation = lru_cache(maxsize=2 * len(self.buckets) + 2)(self._make_permutation)

    def __reduce__(self) -> tuple[type[Order], tuple[list[np.ndarray], int, int]]:
        last = max(self.buckets)
        empty = np.empty(0, dtype=np.int64)
        return Order, ([self.buckets.get(b, empty) for b in range(last + 1)], self.batch, self.seed)

    def place(self, index: int) -> tuple[int, int]:
        """Return the bucket of a global index and the position in the bucket's list of images."""
        k, inside = divmod(index, self.batch)
        cycle, j = divmod(k, sum(self.filled.values()))
        buckets, ranks = self._cycle(cycle)
        bucket = int(buckets[j])
        seen = (cycle * self.filled[bucket] + int(ranks[j])) * self.batch + inside
        number, offset = divmod(seen, len(self.buckets[bucket]))
        return bucket, int(self._permutation(bucket, number)[offset])

    def item(self, index: int, skip: int = 0) -> tuple[int, int]:
        """Return the bucket and the image of a global index.

        Args:
            index: The global index.
            skip: Number of images to pass over, for one that is broken: the next ones of the bucket stand in.
                Default: 0.
        """
        bucket, position = self.place(index)
        items = self.buckets[bucket]
        return bucket, int(items[(position + skip) % len(items)])

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for each batch of a cycle its bucket, and how many batches of that bucket precede it."""
        buckets = np.repeat(list(self.filled), list(self.filled.values()))
        if len(self.filled) > 1:
            buckets = self._generator(CYCLE, cycle).permutation(buckets)
        ranks = np.empty_like(buckets)
        for bucket, count in self.filled.items():
            ranks[buckets == bucket] = np.arange(count)
        return buckets, ranks

    def _make_permutation(self, bucket: int, number: int) -> np.ndarray:
        return self._generator(bucket, number).permutation(len(self.buckets[bucket]))

    def _generator(self, bucket: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, bucket, number])
