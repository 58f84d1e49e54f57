"""Captioned images of any origin: the protocol that readers implement, and the record of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of an image before it is decoded.

    Args:
        name: Its name, which no other image of the data set has: a path, or shard and key.
        captions: Its captions; the first is the canonical one. Empty if it has none.
        height: Height in pixels, upright.
        width: Width in pixels, upright.
        fingerprint: Changes when the file does: name, size in bytes and time of the last change.
    """

    name: str
    captions: tuple[str, ...]
    height: int
    width: int
    fingerprint: str


class Problem(NamedTuple):
    """Something about a file that the user should know.

    Attributes:
        name: The file.
        kind: One of `BROKEN` or of `NOTED`.
        reason: What is wrong, in a few words.
    """

    name: str
    kind: str
    reason: str


BROKEN = ("unreadable", "too large")
"""Kinds of problems of files that count toward `max_broken`; none of them is trained on."""
NOTED = (
    "too small",
    "duplicate",
    "no caption",
    "caption without an image",
    "bad metadata",
    "several frames",
    "several images",
    "symlink loop",
    "not an image",
)
"""Kinds of problems that are reported and do not stop a run."""


class Dataset(Protocol):
    """Captioned images by number.

    Everything that trains reads a data set through this protocol. It must be picklable, as other processes
    read from it too, and hold its records in arrays, so that processes share their memory.
    """

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What was found when the data set was opened."""

    def __len__(self) -> int:
        """Return the number of images that can be trained on, as far as their headers tell."""

    def record(self, i: int) -> Record:
        """Return what is known of image i."""

    def open(self, i: int, least: int | None = None) -> Image:
        """Decode image i: upright, 8-bit RGB, with transparency composited on the background.

        Args:
            i: Its number.
            least: Side in pixels below which the decoder may not reduce the image, to be faster; None for
                the file's own size. Default: None.

        Raises:
            ValueError: If the file is broken; the message says how.
        """
