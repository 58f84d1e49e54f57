"""BERT's uncased WordPiece tokenizer (Devlin et al. 2018; Wu et al. 2016), from a vocabulary file."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ldm.support.text import read_utf8, shown

MAX_VOCABULARY = 1 << 24  # bytes of a vocab.txt; that of bert-base-uncased has 232 KB
WORDPIECE_PAD, WORDPIECE_UNKNOWN, WORDPIECE_START, WORDPIECE_END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
LONGEST = 100  # maximum number of characters of a word; longer words are unknown
# ideographs, each of which is a word: CJK unified, extensions A to E, and the compatibility blocks
IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPiece:
    """WordPiece tokenizer.

    Texts are lower-cased, stripped of accents, and split at spaces and punctuation; each word is split into
    the longest pieces of the vocabulary.

    Args:
        vocabulary: Tokens in the order of their ids.

    Raises:
        ValueError: If a special token is missing.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = {token: i for i, token in enumerate(vocabulary)}
        missing = [
            token
            for token in (WORDPIECE_PAD, WORDPIECE_UNKNOWN, WORDPIECE_START, WORDPIECE_END)
            if token not in self.vocabulary
        ]
        if missing:
            raise ValueError(
                f"the vocabulary lacks {', '.join(missing)}, expected that of BERT: one token per line"
            )

    @classmethod
    def from_file(cls, path: str | Path) -> WordPiece:
        """Return the tokenizer of a `vocab.txt` with one token per line (30522 in bert-base-uncased).

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a special token is missing.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no vocabulary at {str(path)!r}: expected the vocab.txt of bert-base-uncased"
            )
        text = read_utf8(path, MAX_VOCABULARY)
        try:
            return cls(text.removesuffix("\n").split("\n"))
        except ValueError as error:
            raise ValueError(f"{shown(str(path))}: {error}") from None

    def __call__(self, texts: Sequence[str], length: int = 77) -> list[list[int]]:
        """Return the ids of texts between [CLS] and [SEP], padded with [PAD] to `length`.

        Raises:
            ValueError: If a text is too long.
        """
        rows = [self.encode(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) + 2 > length:
                raise ValueError(
                    f"{shown(text)} has {len(row) + 2} tokens with start and end, expected at most {length}"
                )
        return self.pad(rows, length)

    def pad(self, rows: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        """Return rows of ids between [CLS] and [SEP], padded with [PAD] to `length`, which they must fit."""
        start, end, pad = (
            self.vocabulary[token] for token in (WORDPIECE_START, WORDPIECE_END, WORDPIECE_PAD)
        )
        return [[start, *row, end] + [pad] * (length - len(row) - 2) for row in rows]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end."""
        return [token for _, ids in self.word_ids(text) for token in ids]

    def word_ids(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return the words of a text in order, each with its ids."""
        return [
            (word, tuple(self.vocabulary[piece] for piece in self.pieces(word))) for word in split_words(text)
        ]

    def pieces(self, word: str) -> list[str]:
        """Return a word as the longest pieces, from its start; [UNK] alone if a part has no piece."""
        if len(word) > LONGEST:
            return [WORDPIECE_UNKNOWN]
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = word[start:end] if start == 0 else f"##{word[start:end]}"
                if piece in self.vocabulary:
                    found.append(piece)
                    start = end
                    break
            else:
                return [WORDPIECE_UNKNOWN]
        return found


def split_words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, lower-cased and without accents."""
    spaced = []
    for char in text:
        category = unicodedata.category(char)
        if char in "\t\n\r" or category == "Zs":
            spaced.append(" ")
        elif char not in "\0\ufffd" and not category.startswith("C"):
            spaced.append(f" {char} " if any(low <= ord(char) <= high for low, high in IDEOGRAPHS) else char)
    bare = (
        char for char in unicodedata.normalize("NFD", "".join(spaced)) if unicodedata.category(char) != "Mn"
    )
    return "".join(f" {char} " if is_punctuation(char) else char for char in "".join(bare).lower()).split()


def is_punctuation(char: str) -> bool:
    """Return whether a character is punctuation in Unicode, or an ASCII symbol such as $, + or ^."""
    return unicodedata.category(char).startswith("P") or (
        char.isascii() and char.isprintable() and not char.isalnum() and not char.isspace()
    )
