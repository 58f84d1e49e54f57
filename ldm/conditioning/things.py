"""Find the things that a prompt names, by longest match in a table of nouns.

The text of a model with exemplars does not contain names: each thing is replaced by a slot word, which is the
same for all things, and shown by an exemplar. "a blue cat face to the left of a rocket" is read as "a blue
alpha to the left of a beta".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ldm.conditioning.words import words_in

SLOT_WORDS = ("alpha", "beta", "gamma", "delta")
"""What stands for the first, second, ... thing of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Mention:
    """A thing that a text names.

    Attributes:
        phrase: The words that name it.
        names: The names that the phrase may mean, at least one.
        style: The style that the text asks for, or None.
    """

    phrase: str
    names: tuple[str, ...]
    style: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReadText:
    """A text with the things that it names.

    Attributes:
        words: The words that the model reads. A thing is one word, its phrase.
        slots: For each word the number of its thing, counted from 0, or None for a word of grammar.
        mentions: The things, in the order of their slots.
        unknown: Words that are left out, in order, each once.
    """

    words: tuple[str, ...]
    slots: tuple[int | None, ...]
    mentions: tuple[Mention, ...]
    unknown: tuple[str, ...]

    @property
    def text(self) -> str:
        """The text with slot words in place of phrases."""
        pairs = zip(self.words, self.slots, strict=True)
        return " ".join(word if slot is None else SLOT_WORDS[slot] for word, slot in pairs)


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """What a prompt may consist of.

    Args:
        nouns: The names that each noun phrase may mean. A phrase that is a name means that name alone.
        styles: The names of styles, which may stand before a noun.
        grammar: The words that state facts, which the text tower reads.

    Attributes:
        phrases: The names that each noun phrase, as words, may mean.
        style_phrases: The style that each phrase, as words, names.
        longest: The number of words of the longest noun phrase.

    Raises:
        ValueError: If a slot word is a word of grammar.
    """

    nouns: Mapping[str, Sequence[str]]
    styles: Sequence[str]
    grammar: frozenset[str]
    phrases: Mapping[tuple[str, ...], tuple[str, ...]] = field(init=False, repr=False)
    style_phrases: Mapping[tuple[str, ...], str] = field(init=False, repr=False)
    longest: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if taken := self.grammar.intersection(SLOT_WORDS):
            raise ValueError(f"grammar: expected none of the slot words, got {sorted(taken)}")
        phrases: dict[tuple[str, ...], tuple[str, ...]] = {}
        for noun, names in self.nouns.items():
            if words := tuple(words_in(noun)):
                both = dict.fromkeys((*phrases.get(words, ()), *names))
                own = "-".join(words)
                phrases[words] = (own,) if own in both else tuple(both)
        # a word of grammar alone is never a thing: "left", "orange"
        kept = {
            words: names for words, names in phrases.items() if len(words) > 1 or words[0] not in self.grammar
        }
        object.__setattr__(self, "phrases", kept)
        object.__setattr__(self, "style_phrases", {tuple(words_in(style)): style for style in self.styles})
        object.__setattr__(self, "longest", max(map(len, kept), default=0))

    @cached_property
    def noun_of(self) -> Mapping[str, str]:
        """For each name a phrase that may mean it: its own if that is read as a thing."""
        found: dict[str, str] = {}
        for words, names in self.phrases.items():
            for name in names:
                if name not in found or names == (name,):
                    found[name] = " ".join(words)
        return found

    def read(self, text: str, *, slots: int, taken: Iterable[Mention] = ()) -> ReadText:
        """Return the things that a text names, and its words.

        The style of a thing is the last one named between it and the thing before. A thing beyond the number
        of slots is left out, as unknown words are.

        Args:
            text: The text.
            slots: The largest number of things.
            taken: Things of the prompt's earlier parts, which have the first slots. Default: none.
        """
        given, words = tuple(taken), words_in(text)
        read: list[str] = []
        places: list[int | None] = []
        mentions, unknown = list(given), []
        style, i = None, 0
        while i < len(words):
            run = self._longest(words, i, self.phrases)
            style_run = self._longest(words, i, self.style_phrases)
            if run and run >= style_run:
                phrase = " ".join(words[i : i + run])
                if len(mentions) < slots:
                    names = self.phrases[tuple(words[i : i + run])]
                    read.append(phrase)
                    places.append(len(mentions))
                    mentions.append(Mention(phrase=phrase, names=names, style=style))
                else:
                    unknown.append(phrase)
                style, i = None, i + run
            elif style_run:
                style, i = self.style_phrases[tuple(words[i : i + style_run])], i + style_run
            else:
                if words[i] in self.grammar:
                    read.append(words[i])
                    places.append(None)
                else:
                    unknown.append(words[i])
                i += 1
        return ReadText(
            words=tuple(read),
            slots=tuple(places),
            mentions=tuple(mentions),
            unknown=tuple(dict.fromkeys(unknown)),
        )

    def _longest(self, words: Sequence[str], i: int, phrases: Mapping[tuple[str, ...], object]) -> int:
        """Return the number of words of the longest phrase that begins at word i, or 0."""
        for run in range(min(self.longest, len(words) - i), 0, -1):
            if tuple(words[i : i + run]) in phrases:
                return run
        return 0
