"""The byte-level byte-pair tokenizer of BART and DALL·E Mini (Radford et al. 2019).

Vocabulary and merges are those of a checkpoint's own files. A word begins with its space, whose symbol is Ġ.
Without those files there is `ByteTokenizer.spelling`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.models.text.bpe import byte_symbols, join_pairs
from ldm.models.text.cleaning import CLEANINGS
from ldm.support.config import nearest
from ldm.support.text import shown

START_TOKEN, PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN = SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MOST_SYMBOLS = 2**20  # of a vocabulary, and merges
LONGEST_SYMBOL = 1000  # characters
# words of ASCII text as GPT-2 splits it; each takes the space before it
BYTE_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


class ByteTokenizer:
    """Tokenizer of texts that are cleaned to ASCII first.

    Args:
        vocabulary: Id of each symbol, among them those of `SPECIAL_TOKENS`.
        merges: Merges "first second", the earliest first.
        cleaning: How texts are cleaned and split: "min-dalle" or "dalle-mini" (`ldm.models.text.cleaning`).
            Default: "min-dalle".

    Raises:
        ValueError: If a special token is missing, an id is no whole number from 0 to 2**20, given twice, or a
            merge is no pair.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], merges: Sequence[str], *, cleaning: str = "min-dalle"
    ) -> None:
        if cleaning not in CLEANINGS:
            raise ValueError(f"cleaning: {shown(cleaning)}; {nearest(cleaning, CLEANINGS)}")
        check_symbols(vocabulary, merges)
        self.ids = dict(vocabulary)
        self.merges = tuple(merges)
        self.cleaning = cleaning
        self.clean = CLEANINGS[cleaning]
        self.split: Callable[[str], list[str]] = (
            space_words if cleaning == "min-dalle" else BYTE_WORDS.findall
        )
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._cache: dict[str, tuple[int, ...]] = {}  # ids by word

    @classmethod
    def spelling(cls) -> ByteTokenizer:
        """Return a tokenizer that spells words byte by byte, for models without files."""
        symbols = [*SPECIAL_TOKENS, *byte_symbols()]
        return cls({symbol: i for i, symbol in enumerate(symbols)}, ())

    def __len__(self) -> int:
        """Return one more than the largest id."""
        return max(self.ids.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end."""
        return [token for word in self.split(self.clean(text)) for token in self._bpe(word)]

    def __call__(self, texts: str | Sequence[str], length: int) -> tuple[Tensor, list[str]]:
        """Return the ids of texts and the texts that were cut.

        Args:
            texts: One text, or B texts.
            length: Length L of the rows, at least 2. Longer texts are cut; the end token is kept.

        Returns:
            Rows of start, tokens, end and padding, int64, shape (B, L), and the texts that did not fit.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = torch.full((len(texts), length), self.ids[PAD_TOKEN], dtype=torch.long, device="cpu")
        cut = []
        for i, text in enumerate(texts):
            ids = self.encode(text)
            if len(ids) + 2 > length:
                cut.append(text)
            row = [self.ids[START_TOKEN], *ids[: length - 2], self.ids[END_TOKEN]]
            rows[i, : len(row)] = torch.tensor(row, device="cpu")
        return rows, cut

    def _bpe(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word that starts with its space; of symbols without an id, that of <unk>."""
        if word not in self._cache:
            table = byte_symbols()
            symbols = [table[byte] for byte in word.encode("utf-8")]
            join_pairs(symbols, self._ranks)
            self._cache[word] = tuple(self.ids.get(s, self.ids[UNKNOWN_TOKEN]) for s in symbols if s)
        return self._cache[word]


def space_words(text: str) -> list[str]:
    """Return the words between spaces, each with a space before it."""
    return [f" {word}" for word in text.split(" ") if word]


def check_symbols(vocabulary: Mapping[str, object], merges: Sequence[object]) -> None:
    """Check the content of a tokenizer's files.

    Args:
        vocabulary: Id of each symbol.
        merges: The merges.

    Raises:
        ValueError: See `ByteTokenizer`.
    """
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
        raise ValueError(
            f"vocabulary: expected the tokens {', '.join(SPECIAL_TOKENS)}, it lacks {missing[0]}"
        )
    if max(len(vocabulary), len(merges)) > MOST_SYMBOLS:
        raise ValueError(f"vocabulary: expected at most {MOST_SYMBOLS:,} symbols and merges")
    for symbol, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < MOST_SYMBOLS or len(symbol) > LONGEST_SYMBOL:
            raise ValueError(f"vocabulary: expected ids of symbols, got {shown(symbol)}: {shown(index)}")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ValueError("vocabulary: expected different ids, some are given twice")
    for pair in merges:
        if not isinstance(pair, str) or len(pair) > LONGEST_SYMBOL or len(pair.split(" ")) != 2:
            raise ValueError(f"merges: expected two symbols with a space between, got {shown(pair)}")
