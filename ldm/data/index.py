"""What is in the emoji data set: the rows of its index, what is held out, and the memory-mapped pictures."""

from __future__ import annotations

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
PICTURES_FILE, INDEX_FILE, MANIFEST_FILE = "pictures.npy", "index.json", "manifest.json"
BUILD_COMMAND = "python -m ldm.data.emoji"
HELD_OUT = 0.05  # the share of (name, style) pictures, and of (name, ground) pairs, that no training sees
TAG_NAMES = 8  # a tag stands for a picture by itself only if at most this many names carry it


def _fraction(*key: str) -> float:
    """A number in [0, 1) that depends on the strings alone, not on any order."""
    digest = hashlib.sha256("\n".join(("ldm emoji held-out 1", *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@functools.cache
def held_out_picture(name: str, style: str) -> bool:
    """Whether the picture of this name in this style is kept out of every training: about 5 % of all."""
    return _fraction("picture", name, style) < HELD_OUT


@functools.cache
def held_out_pair(name: str, ground: str | None) -> bool:
    """Whether this name (in any style) on this ground is kept out of every training: about 5 % of the pairs.

    Never for white, said or not (None): every picture of the source lies on white.
    """
    if ground is not None and ground not in PALETTE:
        raise ValueError(f"ground {ground!r}: not in the palette; {nearest(ground, PALETTE)}")
    return ground not in (None, "white") and _fraction("pair", name, ground) < HELD_OUT


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One row of the index: a picture's name ("red-apple"), style, and emojibase's label and tags where it
    has them."""

    name: str
    style: Style
    label: str | None = None
    tags: tuple[str, ...] = ()
    held_out: bool = False

    @property
    def phrase(self) -> str:
        """The name as a caption says it: "red apple"."""
        return self.name.replace("-", " ")


class PictureIndex:
    """The rows of a data set in the order of its pictures, with look-ups.

    ``train`` and ``held_out`` (int arrays) part all rows; ``train_of[style]`` is the training rows of one
    style.
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
        self._at = {(row.name, row.style): i for i, row in enumerate(self.rows)}
        if len(self._at) != len(self.rows):
            twice = [
                key for key, count in Counter((row.name, row.style) for row in self.rows).items() if count > 1
            ]
            raise ValueError(f"the index has a (name, style) more than once: {twice[:5]}")
        names = {row.phrase for row in self.rows} | {row.label for row in self.rows if row.label}
        carriers = Counter(tag for _, tag in {(row.name, tag) for row in self.rows for tag in row.tags})
        said = {
            tag for tag, count in carriers.items() if count <= TAG_NAMES and len(tag) > 2 and tag not in names
        }
        # those precise enough to say alone
        self.said_tags = tuple(tuple(tag for tag in row.tags if tag in said) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> ImageRecord:
        return self.rows[i]

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.rows)

    def find(self, name: str, style: str = "noto") -> int:
        """The row of a name ("red-apple" or "red apple") in a style; ValueError with the nearest name if
        there is none."""
        key = (name.replace(" ", "-"), style)
        if key in self._at:
            return self._at[key]  # type: ignore[index]
        if style not in STYLES:
            raise ValueError(f"style {style!r}: no such style; {nearest(style, STYLES)}")
        import difflib

        close = difflib.get_close_matches(key[0], [row.name for row in self.rows if row.style == style], n=3)
        raise ValueError(
            f"no picture named {name!r} in style {style!r}; nearest: {', '.join(close) or 'none'}"
        )

    def has(self, name: str, style: str = "noto") -> bool:
        """Whether there is a picture of this name in this style."""
        return (name.replace(" ", "-"), style) in self._at

    def names(self, style: str | None = None, *, held_out: bool | None = None) -> list[str]:
        """The names, each once and sorted; of one style or all, of held-out pictures (True), training ones
        (False) or both."""
        rows = (row for row in self.rows if style in (None, row.style) and held_out in (None, row.held_out))
        return sorted({row.name for row in rows})


@dataclass(frozen=True, kw_only=True)
class EmojiData:
    """The emoji data set: ``pictures`` (N, P, P, 4) uint8 RGBA with straight alpha, memory-mapped, and their
    index."""

    pictures: np.ndarray
    index: PictureIndex
    manifest: dict[str, object]

    @classmethod
    def open(cls, folder: str | Path = "data/emoji") -> EmojiData:
        """The data set in a folder; FileNotFoundError says the command that builds it, ValueError what does
        not fit."""
        folder = Path(folder)
        for name in (PICTURES_FILE, INDEX_FILE, MANIFEST_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no emoji data set in {str(folder)!r} ({name} is absent): build it with `{BUILD_COMMAND}"
                    f" --out {folder}`"
                )
        pictures = np.load(folder / PICTURES_FILE, mmap_mode="r", allow_pickle=False)
        rows = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        index = PictureIndex(ImageRecord(**{**row, "tags": tuple(row["tags"])}) for row in rows)
        if (
            pictures.dtype != np.uint8
            or pictures.ndim != 4
            or pictures.shape[3] != 4
            or pictures.shape[1] != pictures.shape[2]
        ):
            raise ValueError(
                f"{str(folder / PICTURES_FILE)!r}: expected uint8 (N, P, P, 4), got {pictures.dtype}"
                f" {pictures.shape}"
            )
        if len(pictures) != len(index):
            raise ValueError(
                f"{str(folder)!r}: {len(pictures)} pictures but {len(index)} rows in the index; build it"
                f" again with `{BUILD_COMMAND}`"
            )
        return cls(
            pictures=pictures,
            index=index,
            manifest=json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")),
        )

    @property
    def train(self) -> np.ndarray:
        """The rows that training may see, (n,) int."""
        return self.index.train

    @property
    def held_out(self) -> np.ndarray:
        """The rows kept out of every training, (m,) int."""
        return self.index.held_out

    def find(self, name: str, style: str = "noto") -> int:
        """The row of a name in a style (see ``PictureIndex.find``)."""
        return self.index.find(name, style)

    def __len__(self) -> int:
        return len(self.index)
