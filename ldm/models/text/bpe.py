"""CLIP's byte-pair tokenizer (Sennrich et al. 2016; Radford et al. 2021), with the same ids as open_clip's.

Importing open_clip takes seconds, so this module only reads the merges file that the package contains. ASCII
text needs the standard library alone; the packages that repair encodings (ftfy) and know Unicode's letter
classes (regex) are imported when a text requires them.
"""

from __future__ import annotations

import functools
import gzip
import heapq
import html
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MERGES = 48_894  # merges in the vocabulary; the file has more
FILE_BYTES = 600_000  # bytes that contain these merges, of the 3 MB of the file
BASE = 512  # ids of single bytes: 256 inside a word and 256 at its end
BOS, EOT = BASE + MERGES, BASE + MERGES + 1  # 49406, 49407
SIZE = EOT + 1
WORD_END = "</w>"  # suffix of the last symbol of a word
SPECIAL = {"<start_of_text>": BOS, "<end_of_text>": EOT}
PATTERN_PARTS = "|".join(SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d"
# printable ASCII without &, which ftfy and HTML unescaping do not change
PRINTABLE_ASCII = re.compile(r"[\t\n -%'-~]*")
ASCII_WORDS = re.compile(PATTERN_PARTS + r"|[a-z]+|[0-9]|[^\sa-z0-9]+")


class Tokenizer:
    """Tokenizer with the full vocabulary of 49,408 ids, or with a part of it.

    Args:
        vocabulary: Full ids that a small model embeds; the ids of start and end are added. The tokenizer's
            ids are then indices into their sorted list, and words with a token outside the list are left
            out (see `unknown`). None for the full vocabulary. Default: None.

    Raises:
        ValueError: If an id is out of range.
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
        self._cache: dict[str, tuple[int, ...]] = {}  # full ids by word

    def __len__(self) -> int:
        """Return the number of ids."""
        return SIZE if self.vocabulary is None else len(self.vocabulary)

    @property
    def bos_id(self) -> int:
        """Id of the start token."""
        return BOS if self._row is None else self._row[BOS]

    @property
    def eot_id(self) -> int:
        """Id of the end token."""
        return EOT if self._row is None else self._row[EOT]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end."""
        return [token for _, ids in self.word_ids(text) for token in ids]

    def word_ids(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return the words of a text that are in the vocabulary, in order, each with its ids."""
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
        """Return the words of a text that `encode` leaves out, in order and without repetition."""
        if self._row is None:
            return []
        return [
            word
            for word in dict.fromkeys(bpe_words(text))
            if any(token not in self._row for token in self._bpe(word))
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, with a space after each word; invalid UTF-8 becomes U+FFFD.

        Raises:
            ValueError: If an id is out of range.
        """
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
        """Return the ids of B texts: start, tokens, end, then padding.

        Args:
            texts: One text, or B texts.
            context_length: Length L of the rows, at least 2. None for the longest row. Default: 77.
            pad: Id of the padding: 0 in open_clip, 49407 (end) in Stable Diffusion 1. Default: 0.
            truncate: Whether to cut texts that are too long; the end token is kept. Default: False.

        Returns:
            Shape (B, L), int64.

        Raises:
            ValueError: If a text is too long and `truncate` is False, or a number is out of range.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if context_length is not None and context_length < 2:
            raise ValueError(f"context_length: expected at least 2 (start and end), got {context_length}")
        rows = [self.encode(text) for text in texts]
        for i, row in enumerate(rows):
            if context_length is not None and len(row) + 2 > context_length:
                if not truncate:
                    raise ValueError(
                        f"a text has {len(row) + 2} tokens with start and end, expected at most"
                        f" {context_length}: shorten it, or set truncate=True: {texts[i][:60]!r}"
                    )
                rows[i] = row[: context_length - 2]
        return self.pad(rows, context_length, pad)

    def pad(self, rows: Sequence[Sequence[int]], length: int | None, pad: int) -> Tensor:
        """Return rows of ids between start and end, padded to one length.

        Args:
            rows: B rows of ids, each at most `length` − 2 long.
            length: Length L of the result. None for the longest row.
            pad: Id of the padding.

        Returns:
            Shape (B, L), int64.

        Raises:
            ValueError: If `pad` is out of range.
        """
        if not 0 <= pad < len(self):
            raise ValueError(f"pad: expected an id in [0, {len(self) - 1}], got {pad}")
        result = torch.full(
            (len(rows), length or 2 + max(map(len, rows), default=0)), pad, dtype=torch.long, device="cpu"
        )
        for i, row in enumerate(rows):
            result[i, : len(row) + 2] = torch.tensor([self.bos_id, *row, self.eot_id], device="cpu")
        return result

    def _bpe(self, word: str) -> tuple[int, ...]:
        """Return the full ids of a word, whose bytes are joined by the merges, earliest merge first."""
        if word in SPECIAL:
            return (SPECIAL[word],)
        if word in self._cache:
            return self._cache[word]
        table, ids = byte_symbols(), base_ids()
        symbols = [table[byte] for byte in word.encode("utf-8")]
        symbols[-1] += WORD_END
        last = join_pairs(symbols, merges())
        self._cache[word] = tuple(BASE + last[s] if s in last else ids[s] for s in symbols if s)
        return self._cache[word]


def bpe_words(text: str) -> list[str]:
    """Return the words, digits and runs of punctuation of a text.

    The text is cleaned first: encodings are repaired, HTML entities resolved, and letters lower-cased.
    """
    if PRINTABLE_ASCII.fullmatch(text):
        return ASCII_WORDS.findall(text.lower())
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _unicode_words().findall(" ".join(text.split()).lower())


@functools.cache
def _unicode_words() -> Any:  # a compiled pattern of the package regex, which has no type information
    import regex

    return regex.compile(PATTERN_PARTS + r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def join_pairs(symbols: list[str], ranks: Mapping[str, int]) -> dict[str, int]:
    """Join pairs of neighbouring symbols in place, as the merges say.

    The earliest merge that applies joins all its pairs, from the left, before the next one is chosen. The
    time is O(n log n), as only the neighbours of what was joined are looked at again.

    Args:
        symbols: n symbols. A joined pair takes the place of its first symbol; that of the second is "".
        ranks: Rank of each merge "first second".

    Returns:
        The rank of the last merge that made each joined symbol.
    """
    n = len(symbols)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # places of the neighbours
    pairs: dict[int, list[int]] = {}  # places of first symbols by rank; some pairs are gone by now
    queue: list[int] = []  # the ranks, a heap
    made: dict[str, int] = {}

    def rank_at(i: int) -> int | None:
        return ranks.get(f"{symbols[i]} {symbols[after[i]]}") if after[i] < n else None

    def note(i: int) -> None:
        rank = rank_at(i) if i >= 0 else None
        if rank is not None:
            if rank not in pairs:
                heapq.heappush(queue, rank)
            pairs.setdefault(rank, []).append(i)

    for i in range(n):
        note(i)
    while queue:
        rank = heapq.heappop(queue)
        joined = []
        for i in sorted(pairs.pop(rank)):
            if rank_at(i) != rank:
                continue
            j = after[i]
            symbols[i], symbols[j], after[i] = symbols[i] + symbols[j], "", after[j]
            if after[i] < n:
                before[after[i]] = i
            joined.append(i)
            made[symbols[i]] = rank
        for i in joined:
            note(before[i])
            note(i)
    return made


@functools.cache
def byte_symbols() -> tuple[str, ...]:
    """Return the visible character that represents each byte.

    It is the Latin-1 character of the byte if that is visible, else the next one from U+0100 on.
    """
    spare = iter(range(256, 512))
    return tuple(chr(byte) if _visible(byte) else chr(next(spare)) for byte in range(256))


def _visible(byte: int) -> bool:
    return 33 <= byte <= 126 or 161 <= byte <= 255 and byte != 173


@functools.cache
def base_ids() -> dict[str, int]:
    """Return the ids of single bytes by symbol: visible bytes, the others, then the same at a word's end."""
    table = byte_symbols()
    order = sorted(range(256), key=lambda byte: (not _visible(byte), byte))
    symbols = [table[byte] for byte in order]
    return {symbol: i for i, symbol in enumerate([*symbols, *(symbol + WORD_END for symbol in symbols)])}


@functools.cache
def merges() -> dict[str, int]:
    """Return the rank of each merge "first second", from the file in the package open_clip.

    Raises:
        ModuleNotFoundError: If open_clip is not installed.
        ValueError: If the file does not hold the expected merges.
    """
    spec = importlib.util.find_spec("open_clip")  # finds the folder without importing
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "open_clip_torch is not installed, which contains the merges of the tokenizer: pip install"
            " open_clip_torch"
        )
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path) as file:
        text = file.read(FILE_BYTES)
    # the first line is the version of the file
    lines = text.decode("utf-8", errors="ignore").split("\n", MERGES + 1)[1 : MERGES + 1]
    if len(lines) != MERGES or not text.startswith(b'"bpe_simple_vocab_16e6.txt#version'):
        raise ValueError(f"{str(path)!r} does not contain the expected {MERGES} merges")
    return {line: rank for rank, line in enumerate(lines)}


@functools.cache
def all_symbols() -> tuple[str, ...]:
    """Return the symbol of each full id."""
    return (*base_ids(), *(line.replace(" ", "") for line in merges()), *SPECIAL)
