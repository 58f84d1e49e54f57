"""The index of the emoji data set, and its memory-mapped pixels."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.conditioning.words import words_in
from ldm.data.facts import STYLES, Style
from ldm.data.nouns import plural
from ldm.data.wording import grammar_words
from ldm.support.config import build, nearest
from ldm.support.strict_json import read_json
from ldm.support.text import escaped, shown

IMAGES_FILE, INDEX_FILE, MANIFEST_FILE = "pictures.npy", "index.json", "manifest.json"
BUILD_COMMAND = "python -m ldm.data.emoji"
TAG_NAMES = 3  # a caption uses a tag in place of the name only if at most this many names carry it


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One row of the index.

    Args:
        name: The image's name, such as "red-apple".
        style: Its style.
        label: Emojibase's label, or None if it has none.
        tags: Emojibase's tags.
        held_out: Whether the image is kept out of training.
        tints: Whether the image can be recoloured; see `takes_colour`.

    Raises:
        ValueError: If the name is empty, or there is no such style.
    """

    name: str
    style: Style
    label: str | None = None
    tags: tuple[str, ...] = ()
    held_out: bool = False
    tints: bool = True

    def __post_init__(self) -> None:
        if not self.name.strip("- "):
            raise ValueError(f"name: expected words, got {shown(self.name)}")
        if self.style not in STYLES:
            raise ValueError(f"style {shown(self.style)}; {nearest(self.style, STYLES)}")

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
        rows_of: Row numbers of all images of each name.
        labels: Labels that can stand for a name in a caption, by name.
        tags: The tags that are specific enough to stand for a name in a caption, by name.
        phrases: Every noun phrase that can stand for a name.
    """

    def __init__(self, rows: Iterable[ImageRecord]) -> None:
        self.rows = tuple(rows)
        held = np.array([row.held_out for row in self.rows], dtype=bool)
        self.train: np.ndarray = np.flatnonzero(~held)
        self.held_out: np.ndarray = np.flatnonzero(held)
        self.train_of: dict[Style, np.ndarray] = {
            style: np.array([i for i in self.train if self.rows[i].style == style], dtype=np.int64)
            for style in STYLES
        }
        counts = Counter((row.name, row.style) for row in self.rows)
        if repeated := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"the index has a (name, style) more than once: {repeated[:5]}")
        self._row_of: dict[tuple[str, str], int] = {
            (row.name, row.style): i for i, row in enumerate(self.rows)
        }
        self.rows_of: dict[str, tuple[int, ...]] = {}
        for i, row in enumerate(self.rows):
            self.rows_of[row.name] = (*self.rows_of.get(row.name, ()), i)
        self.labels, self.tags = self._find_labels(), self._find_tags()
        self.phrases = frozenset(phrase for name in self.rows_of for phrase in self.nouns(name))
        counted = (plural(noun) for name in self.rows_of for noun in self.counted_nouns(name))
        self._readings = self.phrases.union(filter(None, counted))

    def _find_labels(self) -> dict[str, str]:
        """Return for each name its label, unless that is a grammatical word, its phrase or another's."""
        phrases = {row.phrase for row in self.rows}
        found = {row.name: row.label for row in self.rows if row.label and row.label not in phrases}
        carriers, grammar = Counter(found.values()), grammar_words()
        return {
            name: label
            for name, label in found.items()
            if carriers[label] == 1 and not grammar.issuperset(words_in(label))
        }

    def _find_tags(self) -> dict[str, tuple[str, ...]]:
        """Return for each name the tags that few names carry: "apple" for red apple, but not for pie.

        Of the names that carry a tag, those that contain it come before the others. A tag that ends with a
        grammatical word could not be distinguished from a noun before that word ("rock on the left").
        """
        taken = {row.phrase for row in self.rows} | {row.label for row in self.rows if row.label}
        grammar, carriers = grammar_words(), dict[str, list[str]]()
        tags = {row.name: row.tags for row in self.rows}
        for name, own in tags.items():
            for tag in dict.fromkeys(own):
                if len(tag) > 2 and tag not in taken and grammar.isdisjoint(words_in(tag)[-1:]):
                    carriers.setdefault(tag, []).append(name)
        for tag, names in carriers.items():
            containing = [name for name in names if f"-{tag.replace(' ', '-')}-" in f"-{name}-"]
            carriers[tag] = containing or names
        found = {
            name: tuple(
                tag for tag in own if name in carriers.get(tag, ()) and len(carriers[tag]) <= TAG_NAMES
            )
            for name, own in tags.items()
        }
        return {name: own for name, own in found.items() if own}

    def counted_nouns(self, name: str) -> tuple[str, ...]:
        """Return the noun phrases of a name that have plurals: its own and its label, but not its tags."""
        return (name.replace("-", " "), *filter(None, (self.labels.get(name),)))

    def nouns(self, name: str) -> tuple[str, ...]:
        """Return the noun phrases that can stand for a name: its own, its label, its specific tags."""
        return (*self.counted_nouns(name), *self.tags.get(name, ()))

    def reads_otherwise(self, modifier: str, noun: str) -> bool:
        """Return whether a word before a noun, or before its first words, makes another noun.

        "small" before "airplane", "purple" before "squares", "blue" before "heart with arrow".
        """
        words = [modifier, *noun.split()]
        return any(" ".join(words[:end]) in self._readings for end in range(2, len(words) + 1))

    def names_other(self, noun: str, name: str) -> bool:
        """Return whether a noun is another name: "houses", the plural of the name "house"."""
        other = noun.replace(" ", "-")
        return other != name and other in self.rows_of

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
            ValueError: If a file is not what it should be, the files do not fit each other, or there is no
                image; the message names the file.
        """
        folder = Path(folder)
        for name in (IMAGES_FILE, INDEX_FILE, MANIFEST_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no emoji data set in {str(folder)!r} ({name} is absent): build it with `{BUILD_COMMAND}"
                    f" --out {folder}`"
                )
        images, index = _read_images(folder / IMAGES_FILE), _read_index(folder / INDEX_FILE)
        if len(images) != len(index):
            raise ValueError(
                f"{str(folder)!r}: {len(images)} images but {len(index)} rows in the index; build it again"
                f" with `{BUILD_COMMAND}`"
            )
        manifest = read_json(folder / MANIFEST_FILE)
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


def _read_images(path: Path) -> np.ndarray:
    """Memory-map the images of a data set, (N, P, P, 4) uint8 with N and P at least 1."""
    try:
        images: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{shown(str(path))}: no NumPy array ({escaped(error, 300)})") from None
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 4 or shape[1] != shape[2] or 0 in shape:
        raise ValueError(
            f"{shown(str(path))}: expected uint8 (N, P, P, 4) with at least one image, got"
            f" {images.dtype} {shape}"
        )
    return images


def _read_index(path: Path) -> ImageIndex:
    """Read the rows of a data set."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(str(path))}: no JSON ({escaped(error, 300)})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{shown(str(path))}: expected a list of rows, got {shown(rows)}")
    try:
        return ImageIndex(build(ImageRecord, row, f"row {i}") for i, row in enumerate(rows))
    except ValueError as error:
        raise ValueError(f"{shown(str(path))}: {error}") from None
