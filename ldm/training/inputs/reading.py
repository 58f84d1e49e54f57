"""Decode the samples of a step, in this process or ahead in others.

A sample depends on nothing but the run's seed and its global index, so that reading ahead changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from ldm.data.dataset import Dataset, Problem
from ldm.data.framing import Frame, crop_to_frame
from ldm.data.order import Order
from ldm.data.sources.config import FilesSection
from ldm.data.sources.scanning import check_problems
from ldm.training.draws import Draws

FRAME = 3  # use of a sample's generators; see `Draws.of_sample`
MOST_STEPS = 1 << 40  # more than any run has


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSample:
    """One image in its frame.

    Args:
        item: Its number in the data set.
        frame: Its frame.
        pixels: The framed image, (H, W, 3) uint8; None if it is not decoded yet. Default: None.
    """

    item: int
    frame: Frame
    pixels: np.ndarray | None = None


class Reading(NamedTuple):
    """Decoded samples, in a form that is cheap to send between processes.

    Attributes:
        items: Their numbers in the data set; where a file was broken, that of the one that stands in.
        frames: Their frames.
        pixels: The framed images, (B, H, W, 3) uint8.
        broken: The broken files.
    """

    items: list[int]
    frames: list[Frame]
    pixels: Tensor
    broken: list[Problem]

    def part(self, start: int, stop: int) -> Reading:
        """Return consecutive samples of these."""
        return Reading(self.items[start:stop], self.frames[start:stop], self.pixels[start:stop], self.broken)

    def samples(self) -> list[ImageSample]:
        """Return the samples."""
        parts = zip(self.items, self.frames, self.pixels.numpy(), strict=True)
        return [ImageSample(item=item, frame=frame, pixels=pixels) for item, frame, pixels in parts]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Decodes samples.

    Args:
        dataset: The images.
        config: How they are framed, and how many may be broken.
        shapes: Sizes (H, W) of the buckets.
        order: Which image each global index shows.
    """

    dataset: Dataset
    config: FilesSection
    shapes: Sequence[tuple[int, int]]
    order: Order

    def read(self, draws: Draws) -> Reading:
        """Decode samples of a step; the next image of the bucket stands in for a broken one."""
        broken: list[Problem] = []
        return _joined([self._read_one(draws, index, broken) for index in draws.samples], broken)

    def read_all(self, samples: Sequence[ImageSample]) -> Reading:
        """Decode samples of one size; broken ones are left out."""
        broken: list[Problem] = []
        found = []
        for sample in samples:
            try:
                found.append(self.decoded(sample))
            except ValueError as error:
                broken.append(self._problem(sample.item, error))
        return _joined(found, broken)

    def _read_one(self, draws: Draws, index: int, broken: list[Problem]) -> ImageSample:
        for skip in range(self.config.max_broken + 1):
            bucket, item = self.order.item(index, skip)
            frame = self.draw_frame(bucket, draws.of_sample(index, FRAME))
            try:
                return self.decoded(ImageSample(item=item, frame=frame))
            except ValueError as error:
                broken.append(self._problem(item, error))
        check_problems({problem.name: problem for problem in broken}.values(), self.config, images=0)
        raise AssertionError("check_problems raises where no image is left")

    def _problem(self, item: int, error: ValueError) -> Problem:
        return Problem(self.dataset.record(item).name, "unreadable", str(error))

    def draw_frame(self, bucket: int, rng: np.random.Generator) -> Frame:
        """Draw a frame of a bucket's shape."""
        place, mirrored = rng.random(2).tolist()
        height, width = self.shapes[bucket]
        return Frame(
            height=height,
            width=width,
            place=place if self.config.crop == "random" else 0.5,
            mirrored=mirrored < self.config.mirror,
        )

    def decoded(self, sample: ImageSample) -> ImageSample:
        """Return a sample with its pixels; ValueError if its file is broken."""
        if sample.pixels is not None:
            return sample
        image = self.dataset.open(sample.item, least=max(sample.frame.height, sample.frame.width))
        return replace(sample, pixels=crop_to_frame(image, sample.frame))


def _joined(samples: Sequence[ImageSample], broken: list[Problem]) -> Reading:
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    shape = (len(pixels), *(pixels[0].shape if pixels else (0, 0, 3)))
    together = torch.empty(shape, dtype=torch.uint8, device="cpu")
    if get_worker_info() is not None:
        together.share_memory_()  # the training process maps what is written here
    if pixels:
        np.stack(pixels, out=together.numpy())
    return Reading([sample.item for sample in samples], [s.frame for s in samples], together, broken)


class Jobs(TorchDataset[Reading]):
    """Readings by number, as torch's loader asks for them."""

    def __init__(self, read: Callable[[int], Reading]) -> None:
        self.read = read

    def __getitem__(self, number: int) -> Reading:
        return self.read(number)


def read_ahead(read: Callable[[int], Reading], numbers: range, workers: int) -> Iterator[Reading]:
    """Return readings in order; with workers, later ones are read meanwhile.

    Args:
        read: Reads one of them; it is sent to the workers.
        numbers: What they are read by.
        workers: Number of processes; 0 for this one.
    """
    if workers == 0:
        return map(read, numbers)
    loader: DataLoader[Any] = DataLoader(
        Jobs(read), batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_unchanged
    )
    return iter(loader)


def _unchanged(reading: Any) -> Any:  # torch's signature is for lists
    return reading


@dataclass(frozen=True)
class _OfStep:
    """Reads the samples of a step by its number."""

    reader: Reader
    draws: Draws

    def __call__(self, step: int) -> Reading:
        return self.reader.read(self.draws.at(step))


class StepLoader:
    """Reads the samples of consecutive steps ahead.

    Args:
        reader: Decodes samples.
        workers: Number of processes; 0 for this one, which reads nothing ahead.
    """

    def __init__(self, reader: Reader, workers: int) -> None:
        self.reader, self.workers = reader, workers
        self._next: tuple[int, int, range] | None = None  # what the iterator gives next
        self._ahead: Iterator[Reading] = iter(())
        self._last: tuple[tuple[int, int, range], Reading] | None = None

    def load(self, draws: Draws) -> Reading:
        """Return samples of a step; the share of the process is read as a whole."""
        share = draws.share
        wanted = (share.seed, share.stream, share.samples)
        if self._last is None or self._last[0] != wanted:
            self._last = wanted, self._load(share, wanted)
        first = draws.samples.start - share.samples.start
        return self._last[1].part(first, first + len(draws))

    def _load(self, share: Draws, wanted: tuple[int, int, range]) -> Reading:
        if self._next != wanted:
            numbers = range(share.step, MOST_STEPS)
            self._ahead = read_ahead(_OfStep(self.reader, share), numbers, self.workers)
        self._next = (share.seed, share.stream, share.at(share.step + 1).samples)
        return next(self._ahead)
