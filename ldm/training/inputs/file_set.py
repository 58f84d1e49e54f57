"""A data set of image files in a run: which images are trained on, in which order, and which are broken."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from ldm.data.dataset import BROKEN, Dataset, Problem
from ldm.data.framing import nearest_bucket
from ldm.data.order import Order
from ldm.data.sources.config import FilesSection
from ldm.data.sources.opening import open_dataset
from ldm.data.sources.scanning import check_problems, describe_problems
from ldm.support.warn import warn_user
from ldm.training.config import RunConfig
from ldm.training.distributed.group import current_processes
from ldm.training.inputs.reading import ImageSample, Reader


class FileSet:
    """The images of a data set, divided into those that are trained on and those that are held out.

    Args:
        config: The data section of the run's configuration.
        run: The run, whose seed and batches decide the order.

    Raises:
        FileNotFoundError: If the data set is absent.
        ValueError: If it has no image to train on, or too many are broken; the message names them.

    Warns:
        UserWarning: Names the files that are left out or lack a caption, before any training.

    Attributes:
        dataset: The data set.
        held: Numbers of the held-out images, sorted.
        train: Numbers of the training images, sorted.
        bucket_of: The bucket of each image, (N,) int.
        reader: Decodes images.
        broken: What is wrong with each broken file, by name.
    """

    def __init__(self, config: FilesSection, run: RunConfig) -> None:
        self.config, self.run = config, run
        # one process reads the headers, and all have the same images
        self.dataset: Dataset = current_processes().once(lambda: open_dataset(config))
        self.broken: dict[str, Problem] = {p.name: p for p in self.dataset.problems if p.kind in BROKEN}
        records = [self.dataset.record(i) for i in range(len(self.dataset))]
        self.held: np.ndarray = held_out_items((record.name for record in records), config.held_out)
        self.train: np.ndarray = np.setdiff1d(np.arange(len(records)), self.held)
        if not len(self.train):
            raise ValueError(f"data.path {config.path!r}: all {len(records)} images are held out")
        shapes = [(config.size, config.size)]
        if config.buckets is not None:
            shapes = config.buckets.sizes(config.size)
        heights = np.array([record.height for record in records])
        widths = np.array([record.width for record in records])
        self.bucket_of: np.ndarray = nearest_bucket(heights, widths, shapes)
        self.reader = Reader(
            dataset=self.dataset, config=config, shapes=shapes, order=self.ordered(self.train)
        )
        if self.dataset.problems:
            warn_user(self.report())

    def report(self) -> str:
        """Return in one line what was found in the files so far; empty if nothing is wrong."""
        later = [problem for problem in self.broken.values() if problem not in self.dataset.problems]
        found = "; ".join(describe_problems([*self.dataset.problems, *later]))
        if not found:
            return ""
        return f"data.path {self.config.path!r}: {len(self.dataset)} images; {found}"

    def ordered(self, items: np.ndarray) -> Order:
        """Return the order in which the run shows images."""
        buckets = [items[self.bucket_of[items] == b] for b in range(int(self.bucket_of.max()) + 1)]
        return Order(buckets, self.run.batch, self.run.seed)

    def key(self, sample: ImageSample) -> str:
        """Return the key in every store of what is computed of an image in its frame."""
        content = f"{self.dataset.record(sample.item).fingerprint}/{tuple(sample.frame)}"
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def note(self, problems: Iterable[Problem]) -> None:
        """Count broken files and warn of them.

        Raises:
            ValueError: If more files are broken than the configuration permits; the message names them.
        """
        new = {problem.name: problem for problem in problems if problem.name not in self.broken}
        if new:
            self.broken |= new
            check_problems(self.broken.values(), self.config, images=1)
            warn_user(f"data.path {self.config.path!r}: {'; '.join(describe_problems(new.values()))}")


def held_out_items(names: Iterable[str], share: float) -> np.ndarray:
    """Return the numbers of the images that are kept for validation, sorted.

    Args:
        names: Names of all images; those with the lowest hashes are taken.
        share: Share of the images, in [0, 1); at least one if it is not 0.
    """
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16] for name in names]
    count = max(1, round(share * len(hashes))) if share else 0
    return np.sort(np.array(sorted(range(len(hashes)), key=hashes.__getitem__)[:count], dtype=np.int64))
