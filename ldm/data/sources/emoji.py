"""The emoji data set as a data set of captioned images: each training image, whole, on a background."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.data.dataset import Problem, Record
from ldm.data.index import EmojiData
from ldm.data.sources.decoding import on_background

if TYPE_CHECKING:
    from PIL.Image import Image


class WholeEmoji:
    """The training images of the emoji data set, without scenes.

    Training draws scenes of several images (`ldm.training.inputs.emoji`); this is what they are drawn from.

    Args:
        data: The emoji data set.
        background: Color behind an image. Default: white.
    """

    problems: tuple[Problem, ...] = ()

    def __init__(self, data: EmojiData, background: tuple[int, int, int] = (255, 255, 255)) -> None:
        self.data, self.background = data, background

    def __len__(self) -> int:
        return len(self.data.train)

    def record(self, i: int) -> Record:
        """Return what is known of image i; its captions are the nouns that stand for it."""
        row = self.data.index[int(self.data.train[i])]
        side = self.data.images.shape[1]
        name = f"{row.style}/{row.name}"
        return Record(
            name=name,
            captions=self.data.index.nouns(row.name),
            height=side,
            width=side,
            fingerprint=f"{name}/{self.data.manifest}",
        )

    def open(self, i: int, least: int | None = None) -> Image:
        """Return image i; see `Dataset.open`."""
        from PIL import Image

        return on_background(Image.fromarray(self.data.images[int(self.data.train[i])]), self.background)
