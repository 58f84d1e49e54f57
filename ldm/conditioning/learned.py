"""Words that stand for learned vectors in a prompt (textual inversion, Gal et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

Words = list[tuple[str, tuple[int, ...]]]


class LearnedWords:
    """The learned words of one text tower.

    Their ids follow those of the tower's vocabulary. A word is found in a text whatever its case, where no
    letter or digit is beside it, the longest first; "embedding:" may stand before it.

    Args:
        vocabulary: Number of ids of the tower.
        width: Width D of a token.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        self._vocabulary, self._width = vocabulary, width
        self._vectors: dict[tuple[str, ...], Tensor] = {}
        self._ids: dict[str, tuple[int, ...]] = {}
        self._pattern: re.Pattern[str] | None = None

    def __bool__(self) -> bool:
        return bool(self._vectors)

    def replace(self, words: Mapping[tuple[str, ...], Tensor]) -> None:
        """Set all words: triggers -> vectors (n, D)."""
        self._vectors, self._ids = dict(words), {}
        first = self._vocabulary
        for triggers, vectors in self._vectors.items():
            ids = tuple(range(first, first + len(vectors)))
            self._ids |= {trigger.lower(): ids for trigger in triggers}
            first += len(vectors)
        names = "|".join(re.escape(name) for name in sorted(self._ids, key=len, reverse=True))
        pattern = rf"(?<!\w)(?:embedding:)?({names})(?!\w)"
        self._pattern = re.compile(pattern, re.IGNORECASE) if names else None

    def embeddings(self, like: Tensor) -> Tensor | None:
        """Return the vectors of all words, (N, D), in the dtype of a tensor; None if there are none."""
        if not self._vectors:
            return None
        return torch.cat(list(self._vectors.values())).to(like)

    def word_ids(self, text: str, tokenize: Callable[[str], Words]) -> Words:
        """Return the words of a text and their ids; `tokenize` returns those between learned words."""
        found: Words = []
        for plain, word in self._parts(text):
            found += tokenize(plain)
            if word is not None:
                found.append((word, self._ids[word]))
        return found

    def without(self, text: str) -> str:
        """Return a text with a space in place of each learned word."""
        return " ".join(plain for plain, _ in self._parts(text))

    def _parts(self, text: str) -> Iterator[tuple[str, str | None]]:
        """Yield the plain texts, each with the learned word that follows it (None for the last)."""
        at = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            yield text[at : match.start()], match[1].lower()
            at = match.end()
        yield text[at:], None
