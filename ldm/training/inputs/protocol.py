"""The training images of a run, whatever data set they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from ldm.conditioning.words import words_in
from ldm.data.framing import SizeRecord
from ldm.training.config import RunConfig
from ldm.training.draws import Draws

# Any: each data set draws samples of a class of its own, which only it reads.
Samples: TypeAlias = Sequence[Any]
VALIDATED = 2048  # most images of a validation by retrieval


class Rows(Protocol):
    """What a frozen network makes of cached samples, one row for each."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, rows: Any) -> Any:  # as NumPy's: an array of rows gives an array (B, *shape)
        """Return the outputs of rows, an array (B, *shape) float16."""


class CachedSamples(Protocol):
    """Samples whose latents and embeddings are computed once, by row number."""

    @property
    def images(self) -> TrainingImages:
        """The training images."""

    @property
    def seed(self) -> int:
        """The seed of the run."""

    @property
    def rows(self) -> Samples:
        """All cached samples."""

    def draw(self, draws: Draws) -> tuple[Samples, list[int]]:
        """Draw samples of a step among the cached ones, and return them with their rows."""

    def rows_of(self, samples: Samples) -> list[int]:
        """Return the rows of samples of `TrainingImages.plain`."""

    def cached(
        self, kind: str, key: str, shape: tuple[int, ...], compute: Callable[[Samples], Tensor]
    ) -> Rows:
        """Return a network's outputs for all rows, after computing those that no file holds.

        Args:
            kind: First word of the files' names.
            key: Identifies the network's weights.
            shape: Shape of one row's output.
            compute: Maps B samples to outputs (B, *shape).
        """


class TrainingImages(Protocol):
    """The training images of a run.

    Sample g of a run is a function of its seed and of g; see `ldm.training.draws`.
    """

    @property
    def size(self) -> int:
        """Side of a square image in pixels."""

    def report(self) -> str:
        """Return in one line what was found in the files so far; empty if there is nothing to tell."""

    def draw(self, draws: Draws) -> Samples:
        """Return samples of a step."""

    def tensor(self, samples: Samples) -> Tensor:
        """Return the images of samples, (B, 3, H, W) float32 in [−1, 1]."""

    def captions(self, samples: Samples, draws: Draws, *, drop: float = 0.0) -> list[str]:
        """Draw a caption for each of samples of a step; it is empty with probability `drop`."""

    def describe(self, samples: Samples) -> list[str]:
        """Return the canonical captions of samples."""

    def wordings(self, samples: Samples, seed: int) -> list[str]:
        """Return a random caption of each sample, the same for the same seed."""

    def sizes(self, samples: Samples) -> list[SizeRecord]:
        """Return the size conditions of samples (Podell et al. 2023, section 2.2)."""

    def held_out(self, n: int) -> Samples:
        """Return at most n images that are never trained on, the same at every call."""

    def plain(self, n: int, seed: int) -> Samples:
        """Return at most n training images without random changes, the same for the same seed."""

    def prompts(self, n: int) -> list[str]:
        """Return n prompts to show what a network has learned."""

    def texts(self) -> Iterable[str]:
        """Return texts that contain every word of every caption of a training image."""

    def cached(self, run: RunConfig, variants: int) -> CachedSamples:
        """Return the samples whose latents and embeddings a run computes once.

        Args:
            run: The run.
            variants: Number of random samples among them, for data sets that draw any number of samples.
        """


@runtime_checkable
class TrainsOnImages(Protocol):
    """A part that is trained on images."""

    @property
    def images(self) -> TrainingImages:
        """The images."""


def words_of(images: TrainingImages) -> list[str]:
    """Return the words of all captions of training images, sorted."""
    return sorted({word for text in images.texts() for word in words_in(text)})
