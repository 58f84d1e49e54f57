"""The index of the emoji data set, the held-out images, and the memory-mapped pixels."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ldm.data.palette import PALETTE
from ldm.support.config import nearest

Style = Literal["noto", "fluent", "twemoji"]
STYLES: tuple[Style, ...] = get_args(Style)
IMAGES_FILE, INDEX_FILE, MANIFEST_FILE = "pictures.npy", "index.json", "manifest.json"
BUILD_COMMAND = "python -m ldm.data.emoji"
HELD_OUT = 0.05  # the share of (name, style) images, and of (name, background) pairs, kept out of training
TAG_NAMES = 8  # a caption uses a tag in place of the name only if at most this many names carry it


def _fraction(*key: str) -> float:
    """Return a number in [0, 1) that is a hash of the strings alone."""
    digest = hashlib.sha256("\n".join(("ldm emoji held-out 1", *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@functools.cache
def held_out_image(name: str, style: str) -> bool:
    """Return whether the image of this name in this style is kept out of every training: about 5 % of all."""
    return _fraction("picture", name, style) < HELD_OUT


@functools.cache
def held_out_pair(name: str, background: str | None) -> bool:
    """Return whether this name (in any style) on this background is kept out of every training.

    About 5 % of the pairs are held out; pairs with white never are, whether the caption names it or not
    (None), because every source image is seen on white.

    Raises:
        ValueError: If the background is not in the palette.
    """
    if background is not None and background not in PALETTE:
        raise ValueError(f"background {background!r}: not in the palette; {nearest(background, PALETTE)}")
    return background not in (None, "white") and _fraction("pair", name, background) < HELD_OUT


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One row of the index.

    Args:
        name: The image's name, such as "red-apple".
        style: Its style.
        label: Emojibase's label, or None if it has none.
        tags: Emojibase's tags.
        held_out: Whether the image is kept out of training.
    """

    name: str
    style: Style
    label: str | None = None
    tags: tuple[str, ...] = ()
    held_out: bool = False

    @property
    def phrase(self) -> str:
        """The name as captions write it: "red apple"."""
        return self.name.replace("-", " ")


class ImageIndex:
    """The rows of a data set, in the order of its images, with look-ups.

    Attributes:
        rows: All rows.
        train: Row numbers of the training images, (n,) int.
        held_out: Row numbers of the held-out images, (m,) int.
        train_of: Row numbers of the training images of each style.
        caption_tags: For each row, the tags that are specific enough to stand for the name in a caption.
    """

    def __init__(self, rows: Iterable[ImageRecord]) -> None:
        self.rows = tuple(rows)
        held = np.array([row.held_out for row in self.rows], dtype=bool)
        self.train: np.ndarray = np.flatnonzero(~held)
        self.held_out: np.ndarray = np.flatnonzero(held)
        self.train_of: dict[str, np.ndarray] = {
            style: np.array([i for i in self.train if self.rows[i].style == style], dtype=np.int64)
            for style in STYLES
        }
        counts = Counter((row.name, row.style) for row in self.rows)
        if repeated := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"the index has a (name, style) more than once: {repeated[:5]}")
        self._row_of: dict[tuple[str, str], int] = {
            (row.name, row.style): i for i, row in enumerate(self.rows)
        }
        self.caption_tags = self._find_caption_tags()

    def _find_caption_tags(self) -> tuple[tuple[str, ...], ...]:
        names = {row.phrase for row in self.rows} | {row.label for row in self.rows if row.label}
        carriers = Counter(tag for _, tag in {(row.name, tag) for row in self.rows for tag in row.tags})
        specific = {
            tag for tag, count in carriers.items() if count <= TAG_NAMES and len(tag) > 2 and tag not in names
        }
        return tuple(tuple(tag for tag in row.tags if tag in specific) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> ImageRecord:
        return self.rows[i]

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.rows)

    def find(self, name: str, style: str = "noto") -> int:
        """Return the row number of a name ("red-apple" or "red apple") in a style.

        Raises:
            ValueError: If there is none; the message names the nearest ones.
        """
        key = (name.replace(" ", "-"), style)
        if key in self._row_of:
            return self._row_of[key]
        if style not in STYLES:
            raise ValueError(f"style {style!r}: no such style; {nearest(style, STYLES)}")
        close = difflib.get_close_matches(key[0], [row.name for row in self.rows if row.style == style], n=3)
        raise ValueError(f"no image named {name!r} in style {style!r}; nearest: {', '.join(close) or 'none'}")

    def has(self, name: str, style: str = "noto") -> bool:
        """Return whether there is an image of this name in this style."""
        return (name.replace(" ", "-"), style) in self._row_of

    def names(self, style: str | None = None, *, held_out: bool | None = None) -> list[str]:
        """Return the names, each once and sorted.

        Args:
            style: Only names in this style; None for all styles. Default: None.
            held_out: True for held-out images, False for training images, None for both. Default: None.
        """
        rows = (row for row in self.rows if style in (None, row.style) and held_out in (None, row.held_out))
        return sorted({row.name for row in rows})


@dataclass(frozen=True, kw_only=True)
class EmojiData:
    """The emoji data set.

    Args:
        images: Memory-mapped pixels, (N, P, P, 4) uint8 RGBA with straight alpha.
        index: What each image shows.
        manifest: The packages that it was built from, and hashes.
    """

    images: np.ndarray
    index: ImageIndex
    manifest: dict[str, object]

    @classmethod
    def open(cls, folder: str | Path = "data/emoji") -> EmojiData:
        """Open the data set in a folder.

        Raises:
            FileNotFoundError: If a file is absent; the message names the command that builds the data set.
            ValueError: If the files do not fit each other.
        """
        folder = Path(folder)
        for name in (IMAGES_FILE, INDEX_FILE, MANIFEST_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no emoji data set in {str(folder)!r} ({name} is absent): build it with `{BUILD_COMMAND}"
                    f" --out {folder}`"
                )
        images = np.load(folder / IMAGES_FILE, mmap_mode="r", allow_pickle=False)
        shape = images.shape
        if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 4 or shape[1] != shape[2]:
            raise ValueError(
                f"{str(folder / IMAGES_FILE)!r}: expected uint8 (N, P, P, 4), got {images.dtype} {shape}"
            )
        rows = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        index = ImageIndex(ImageRecord(**{**row, "tags": tuple(row["tags"])}) for row in rows)
        if len(images) != len(index):
            raise ValueError(
                f"{str(folder)!r}: {len(images)} images but {len(index)} rows in the index; build it again"
                f" with `{BUILD_COMMAND}`"
            )
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return cls(images=images, index=index, manifest=manifest)

    @property
    def train(self) -> np.ndarray:
        """Row numbers of the training images, (n,) int."""
        return self.index.train

    @property
    def held_out(self) -> np.ndarray:
        """Row numbers of the images kept out of every training, (m,) int."""
        return self.index.held_out

    def find(self, name: str, style: str = "noto") -> int:
        """Return the row number of a name in a style; see `ImageIndex.find`."""
        return self.index.find(name, style)

    def __len__(self) -> int:
        return len(self.index)
