"""CLIP's byte-pair tokenizer (Sennrich et al. 2016; Radford et al. 2021), with ids equal to open_clip's but
without importing it.

Importing open_clip takes seconds. This reads the merges file that it ships, and treats plain ASCII with the
standard library alone: the repair of broken encodings (ftfy) and Unicode's letter classes (regex) are
imported for a text that needs them.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MERGES = 48_894  # lines used of the merges file
FILE_BYTES = 600_000  # more than these lines take; the file goes on to 3 MB
BASE = 512  # 256 bytes inside a word, 256 at a word's end
BOS, EOT = BASE + MERGES, BASE + MERGES + 1  # 49406, 49407
SIZE = EOT + 1
WORD_END = "</w>"  # marks a word's last symbol
SPECIAL = {"<start_of_text>": BOS, "<end_of_text>": EOT}
PATTERN_PARTS = "|".join(SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d"
PRINTABLE_ASCII = re.compile(
    r"[\t\n -%'-~]*"
)  # printable ASCII without &: ftfy and HTML unescaping leave it as it is
ASCII_WORDS = re.compile(PATTERN_PARTS + r"|[a-z]+|[0-9]|[^\sa-z0-9]+")


class Tokenizer:
    """Text to ids and back, in the full vocabulary of 49,408 or in a part of it.

    ``vocabulary``: the full ids that a small model embeds; the ids given out are then the places in their
    sorted list, to which those of start and end are added. Words with a token outside it are left out;
    `unknown` names them, so that the caller can say so.
    """

    def __init__(self, vocabulary: Iterable[int] | None = None) -> None:
        self.vocabulary: tuple[int, ...] | None = None
        self._row: dict[int, int] | None = None
        if vocabulary is not None:
            ids = sorted({*vocabulary, BOS, EOT})
            if ids[0] < 0 or ids[-1] >= SIZE:
                raise ValueError(
                    f"vocabulary: ids {[i for i in ids if not 0 <= i < SIZE]} are outside [0, {SIZE - 1}]"
                )
            self.vocabulary, self._row = tuple(ids), {token: row for row, token in enumerate(ids)}
        self._words: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        """The number of ids."""
        return SIZE if self.vocabulary is None else len(self.vocabulary)

    @property
    def bos_id(self) -> int:
        """The id that starts a text."""
        return BOS if self._row is None else self._row[BOS]

    @property
    def eot_id(self) -> int:
        """The id that ends a text."""
        return EOT if self._row is None else self._row[EOT]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those of start and end."""
        return [token for _, ids in self.words(text) for token in ids]

    def words(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """The words of a text that have ids, and those ids, in order."""
        found = [(word, self._bpe(word)) for word in bpe_words(text)]
        if self._row is None:
            return found
        row = self._row
        return [
            (word, tuple(row[token] for token in ids))
            for word, ids in found
            if all(token in row for token in ids)
        ]

    def unknown(self, text: str) -> list[str]:
        """The words of a text that the vocabulary lacks and `encode` leaves out, in order, each once."""
        if self._row is None:
            return []
        return [
            word
            for word in dict.fromkeys(bpe_words(text))
            if any(token not in self._row for token in self._bpe(word))
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, a space after each word; bytes that are no UTF-8 become U+FFFD. ValueError for an
        id out of range."""
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < len(self)]
        if wrong:
            raise ValueError(f"ids {wrong} are outside [0, {len(self) - 1}]")
        full = ids if self.vocabulary is None else [self.vocabulary[i] for i in ids]
        codes, symbols = {char: byte for byte, char in enumerate(byte_symbols())}, all_symbols()
        return (
            bytes(codes[char] for i in full for char in symbols[i])
            .decode("utf-8", errors="replace")
            .replace(WORD_END, " ")
        )

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        context_length: int | None = 77,
        pad: int = 0,
        truncate: bool = False,
    ) -> Tensor:
        """The ids of B texts, (B, L) int64: start, tokens, end, then ``pad``.

        ``context_length``: L, None for the longest of the batch; ``pad``: an id as given out, 0 in open_clip,
        49407 (end) as Stable Diffusion 1 pads. ValueError for a text that is too long, which ``truncate``
        cuts instead, keeping the end.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if context_length is not None and context_length < 2:
            raise ValueError(f"context_length: expected at least 2 (start and end), got {context_length}")
        rows = [self.encode(text) for text in texts]
        for i, row in enumerate(rows):
            if context_length is not None and len(row) + 2 > context_length:
                if not truncate:
                    raise ValueError(
                        f"a text of {len(row) + 2} tokens, with those for start and end, does not fit in"
                        f" {context_length}: shorten it, or ask for truncate=True: {texts[i][:60]!r}"
                    )
                rows[i] = row[: context_length - 2]
        return self.pad(rows, context_length, pad)

    def pad(self, rows: Sequence[Sequence[int]], length: int | None, pad: int) -> Tensor:
        """Ids (B, L) int64: start, a row's own, end, then ``pad``; ``length``: L, None for the longest. Rows
        must fit."""
        if not 0 <= pad < len(self):
            raise ValueError(f"pad: expected an id in [0, {len(self) - 1}], got {pad}")
        result = torch.full((len(rows), length or 2 + max(map(len, rows), default=0)), pad, dtype=torch.long)
        for i, row in enumerate(rows):
            result[i, : len(row) + 2] = torch.tensor([self.bos_id, *row, self.eot_id])
        return result

    def _bpe(self, word: str) -> tuple[int, ...]:
        """The full ids of one word: its bytes, of which the neighbours with the earliest merge are joined
        until none has one."""
        if word in SPECIAL:
            return (SPECIAL[word],)
        if word in self._words:
            return self._words[word]
        ranks, table, ids = merges(), byte_symbols(), base_ids()
        parts = [table[byte] for byte in word.encode("utf-8")]
        parts[-1] += WORD_END
        merged: dict[str, int] = {}
        while len(parts) > 1:
            pairs = zip(parts, parts[1:], strict=False)
            rank, first, second = min((ranks.get(f"{a} {b}", MERGES), a, b) for a, b in pairs)
            if rank == MERGES:
                break
            merged[first + second] = BASE + rank
            parts = _join(parts, first, second)
        self._words[word] = tuple(merged[part] if part in merged else ids[part] for part in parts)
        return self._words[word]


def bpe_words(text: str) -> list[str]:
    """The words, numerals and runs of punctuation of a text, cleaned: encodings repaired, HTML entities
    resolved, lower case."""
    if PRINTABLE_ASCII.fullmatch(text):
        return ASCII_WORDS.findall(text.lower())
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _unicode_words().findall(" ".join(text.split()).lower())


@functools.cache
def _unicode_words() -> Any:
    import regex

    return regex.compile(PATTERN_PARTS + r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def _join(parts: list[str], first: str, second: str) -> list[str]:
    """The parts with each ``first`` that ``second`` follows joined to it, from the left."""
    joined, i = [], 0
    while i < len(parts):
        pair = parts[i] == first and i + 1 < len(parts) and parts[i + 1] == second
        joined.append(first + second if pair else parts[i])
        i += 2 if pair else 1
    return joined


@functools.cache
def byte_symbols() -> tuple[str, ...]:
    """The visible character that stands for each byte: itself where Latin-1 shows it, else the next from
    U+0100 on."""
    spare = iter(range(256, 512))
    return tuple(chr(byte) if _visible(byte) else chr(next(spare)) for byte in range(256))


def _visible(byte: int) -> bool:
    return 33 <= byte <= 126 or 161 <= byte <= 255 and byte != 173


@functools.cache
def base_ids() -> dict[str, int]:
    """The ids of single bytes: visible ones first, then the others; after 256 of them, the same at the end of
    a word."""
    table = byte_symbols()
    order = sorted(range(256), key=lambda byte: (not _visible(byte), byte))
    symbols = [table[byte] for byte in order]
    return {symbol: i for i, symbol in enumerate([*symbols, *(symbol + WORD_END for symbol in symbols)])}


@functools.cache
def merges() -> dict[str, int]:
    """The ranks of the merges, "first second" by line, from the file that open_clip ships."""
    spec = importlib.util.find_spec("open_clip")  # finds the folder and imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "open_clip_torch is not installed; it holds the tokenizer's merges: pip install open_clip_torch"
        )
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path) as file:
        text = file.read(FILE_BYTES)
    # the first line is the file's version
    lines = text.decode("utf-8", errors="ignore").split("\n", MERGES + 1)[1 : MERGES + 1]
    if len(lines) != MERGES or not text.startswith(b'"bpe_simple_vocab_16e6.txt#version'):
        raise ValueError(f"{str(path)!r} does not hold the {MERGES} merges expected")
    return {line: rank for rank, line in enumerate(lines)}


@functools.cache
def all_symbols() -> tuple[str, ...]:
    """The symbol of each full id."""
    return (*base_ids(), *(line.replace(" ", "") for line in merges()), *SPECIAL)
