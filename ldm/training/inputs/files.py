"""Training images of a data set of image files: framed and captioned by their global index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from ldm.data.framing import Frame, SizeRecord, size_record
from ldm.data.sources.config import FilesSection
from ldm.training.config import RunConfig
from ldm.training.draws import Draws
from ldm.training.images import to_tensor
from ldm.training.inputs.cached_files import CachedFiles
from ldm.training.inputs.file_set import FileSet
from ldm.training.inputs.protocol import TrainingImages
from ldm.training.inputs.reading import ImageSample, StepLoader

CAPTION = 1  # use of a sample's generators; see `Draws.of_sample`


class FileImages:
    """The images of a data set as a training run sees them.

    Args:
        config: The data section of the run's configuration.
        run: The run, whose seed and batches decide the order.
        validates_held_out: Whether the run validates on held-out images. Default: False.

    Raises:
        FileNotFoundError: If the data set is absent.
        ValueError: If it has no image to train on, or too many are broken; the message names them.

    Warns:
        UserWarning: Names the files that are left out or lack a caption, before any training.
    """

    def __init__(self, config: FilesSection, run: RunConfig, *, validates_held_out: bool = False) -> None:
        self.config, self.files = config, FileSet(config, run)
        if validates_held_out and not len(self.files.held):
            raise ValueError("data.held_out 0: expected a share, as this part validates on held-out images")
        self.steps = StepLoader(self.files.reader, config.workers)

    @property
    def size(self) -> int:
        """Side of a square image in pixels."""
        return self.config.size

    def report(self) -> str:
        """Return in one line what was found in the files so far; empty if nothing is wrong."""
        return self.files.report()

    def draw(self, draws: Draws) -> list[ImageSample]:
        """Return samples of a step, decoded.

        Raises:
            ValueError: If more files are broken than the configuration permits; the message names them.
        """
        reading = self.steps.load(draws)
        self.files.note(reading.broken)
        return reading.samples()

    def tensor(self, samples: Sequence[ImageSample]) -> Tensor:
        """Return the images of samples of one size, (B, 3, H, W) float32 in [−1, 1]."""
        decoded = [self.files.reader.decoded(sample).pixels for sample in samples]
        return to_tensor(np.stack([pixels for pixels in decoded if pixels is not None]))

    def captions(self, samples: Sequence[ImageSample], draws: Draws, *, drop: float = 0.0) -> list[str]:
        """Draw one of the captions of each sample of a step; it is empty with probability `drop`."""
        generators = (draws.of_sample(i, CAPTION) for i in draws.samples)
        return [
            "" if rng.random() < drop else self._caption(sample, rng)
            for sample, rng in zip(samples, generators, strict=True)
        ]

    def _caption(self, sample: ImageSample, rng: np.random.Generator) -> str:
        captions = self.files.dataset.record(sample.item).captions
        return captions[int(rng.integers(len(captions)))] if captions else ""

    def describe(self, samples: Sequence[ImageSample]) -> list[str]:
        """Return the first caption of each sample."""
        return [next(iter(self.files.dataset.record(sample.item).captions), "") for sample in samples]

    def wordings(self, samples: Sequence[ImageSample], seed: int) -> list[str]:
        """Return a random caption of each sample, the same for the same seed."""
        return [self._caption(sample, np.random.default_rng([seed, sample.item])) for sample in samples]

    def sizes(self, samples: Sequence[ImageSample]) -> list[SizeRecord]:
        """Return the size conditions of samples."""
        return [self._size(sample) for sample in samples]

    def _size(self, sample: ImageSample) -> SizeRecord:
        record = self.files.dataset.record(sample.item)
        return size_record(record.height, record.width, sample.frame)

    def held_out(self, n: int) -> list[ImageSample]:
        """Return at most n held-out images, in the center of a square, the same at every call."""
        return self._intact(np.random.default_rng(20).permutation(self.files.held), n)

    def plain(self, n: int, seed: int) -> list[ImageSample]:
        """Return at most n training images, in the center of a square."""
        return self._intact(np.random.default_rng(seed).permutation(self.files.train), n)

    def _intact(self, items: np.ndarray, n: int) -> list[ImageSample]:
        """Return the first n images that can be decoded."""
        found: list[ImageSample] = []
        for item in items.tolist():
            if len(found) == n:
                break
            if self.files.dataset.record(item).name not in self.files.broken:
                reading = self.files.reader.read_all(
                    [ImageSample(item=item, frame=Frame(self.size, self.size))]
                )
                self.files.note(reading.broken)
                found += reading.samples()
        return found

    def prompts(self, n: int) -> list[str]:
        """Return the captions of n training images, in turn if there are fewer."""
        captions = self.describe(self.plain(n, seed=3))
        return [captions[i % len(captions)] for i in range(n)]

    def texts(self) -> Iterable[str]:
        """Return all captions."""
        return (
            caption for i in self.files.train.tolist() for caption in self.files.dataset.record(i).captions
        )

    def cached(self, run: RunConfig, variants: int) -> CachedFiles:
        """Return the training images, each in one frame, for latents that are computed once.

        Args:
            run: The run.
            variants: 0, as there are no images but those of the files.
        """
        if variants:
            raise ValueError(f"variants {variants}: expected 0 for a data set of image files")
        return CachedFiles(self, self.files, run.seed)


def files_only(images: TrainingImages, what: str) -> FileImages:
    """Return images as those of files; ValueError if they are scenes of the emoji, which names `what`."""
    if not isinstance(images, FileImages):
        raise ValueError(f"{what}: expected images of files, as scenes of the emoji have endless captions")
    return images
