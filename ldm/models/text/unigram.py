"""The tokenizer of XLM-R, which splits words into the most probable pieces (Kudo 2018, section 3.2)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.support.strict_json import read_json
from ldm.support.text import shown

UNIGRAM_START, UNIGRAM_PAD, UNIGRAM_END, UNIGRAM_UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
SPACE = "▁"  # prefix of a word
MAX_TOKENIZER = 1 << 25  # bytes of a tokenizer.json; that of XLM-R has 9 MB
LONGEST_PIECE = 256  # characters; the longest of XLM-R has 16
PENALTY = 10.0  # log-probability of the rarest piece minus that of an unknown character


class Unigram:
    """Unigram tokenizer.

    Texts are normalized to NFKC and split at spaces; each word becomes the pieces with the largest sum of
    log-probabilities.

    Args:
        pieces: Pieces with their log-probabilities, in the order of their ids.

    Raises:
        ValueError: If a special token is missing.
    """

    def __init__(self, pieces: Sequence[tuple[str, float]]) -> None:
        self.ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        missing = [
            token
            for token in (UNIGRAM_START, UNIGRAM_PAD, UNIGRAM_END, UNIGRAM_UNKNOWN)
            if token not in self.ids
        ]
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}, expected that of XLM-R")
        special = {UNIGRAM_START, UNIGRAM_PAD, UNIGRAM_END, UNIGRAM_UNKNOWN, "<mask>"}
        self.scores = {piece: float(score) for piece, score in pieces if piece not in special}
        self.longest = max((len(piece) for piece in self.scores), default=1)
        self.unknown = min(self.scores.values(), default=0.0) - PENALTY

    @classmethod
    def from_file(cls, path: str | Path) -> Unigram:
        """Return the tokenizer of a `tokenizer.json`, or of a folder that contains one.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not that of a Unigram tokenizer.
        """
        path = cls.file(path)
        where = shown(str(path))
        model = read_json(path, MAX_TOKENIZER).get("model")
        if not isinstance(model, dict) or model.get("type") != "Unigram":
            raise ValueError(f"{where}: expected the tokenizer.json of a Unigram model")
        pieces: Any = model.get("vocab")
        for pair in pieces if isinstance(pieces, list) else [pieces]:
            match pair:
                case [str(piece), int() | float()] if 1 <= len(piece) <= LONGEST_PIECE:
                    continue
            raise ValueError(
                f"{where}: model.vocab: expected pairs of a piece, of 1 to {LONGEST_PIECE} characters, and a"
                f" number, got {shown(pair)}"
            )
        try:
            return cls([(piece, score) for piece, score in pieces])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @staticmethod
    def file(path: str | Path) -> Path:
        """Return a `tokenizer.json`, or the one in a folder; FileNotFoundError if there is none."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {str(path)!r}: expected the tokenizer.json of XLM-R")
        return path

    @classmethod
    def spelling(cls) -> Unigram:
        """Return a tokenizer of single characters, for models with random weights."""
        letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'!?-"
        return cls(
            [(token, 0.0) for token in (UNIGRAM_START, UNIGRAM_PAD, UNIGRAM_END, UNIGRAM_UNKNOWN)]
            + [(piece, -3.0) for piece in (SPACE, *letters)]
        )

    def __call__(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Return the ids of texts between start and end, padded to `length`.

        Raises:
            ValueError: If a text is too long.
        """
        rows = []
        for text in texts:
            row = [self.ids[UNIGRAM_START], *self.encode(text), self.ids[UNIGRAM_END]]
            if len(row) > length:
                raise ValueError(
                    f"{shown(text)} has {len(row)} tokens with start and end, expected at most {length}"
                )
            rows.append(row + [self.ids[UNIGRAM_PAD]] * (length - len(row)))
        return rows

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end."""
        return [i for word in unicodedata.normalize("NFKC", text).split() for i in self.pieces(SPACE + word)]

    def pieces(self, word: str) -> list[int]:
        """Return the ids of the most probable pieces of a word, found by dynamic programming (Viterbi 1967).

        Adjacent unknown characters become one unknown token.
        """
        # for each end: the best sum of log-probabilities, and the start of its last piece
        best: list[tuple[float, int]] = [(0.0, 0)]
        for end in range(1, len(word) + 1):
            found = (best[end - 1][0] + self.unknown, end - 1)
            for start in range(max(0, end - self.longest), end):
                score = self.scores.get(word[start:end])
                if score is not None and best[start][0] + score > found[0]:
                    found = (best[start][0] + score, start)
            best.append(found)
        ids: list[int] = []
        end, unknown = len(word), self.ids[UNIGRAM_UNKNOWN]
        while end > 0:
            start = best[end][1]
            piece = word[start:end]
            token = self.ids[piece] if piece in self.scores else unknown
            if token != unknown or not ids or ids[-1] != unknown:
                ids.append(token)
            end = start
        return ids[::-1]

    def to_json(self) -> dict[str, object]:
        """Return the content of a `tokenizer.json`, for `from_file` and Hugging Face's tokenizers."""
        vocabulary = [[piece, self.scores.get(piece, 0.0)] for piece in self.ids]
        space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
        return {
            "version": "1.0",
            "normalizer": {"type": "NFKC"},
            "decoder": space,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
            "model": {"type": "Unigram", "unk_id": self.ids[UNIGRAM_UNKNOWN], "vocab": vocabulary},
        }
