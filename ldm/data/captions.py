"""Captions: facts in words that a rule can check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm.conditioning.words import words_in
from ldm.data.facts import Facts, Thing
from ldm.data.index import ImageIndex
from ldm.data.nouns import plural, takes_article, uncoloured
from ldm.data.rendering import THING_AREAS, Area
from ldm.data.wording import (
    BACKGROUND_PHRASES,
    COUNTS,
    PLACE_PHRASES,
    RELATION_PHRASES,
    SMALL,
    grammar_words,
)

# Probabilities of the variations of a caption.
ARTICLE, THE, CANONICAL, LABEL, TAG, PLACE_FIRST = 0.6, 0.1, 0.5, 0.2, 0.08, 0.15


class CaptionPiece(NamedTuple):
    """A piece of a caption.

    Attributes:
        text: The piece, with the spaces that separate it from the next.
        area: What it describes (see `coverage`), or None.
        noun: Whether it is the noun that names a thing; the words before it are its colour, style and size.
    """

    text: str
    area: Area | None = None
    noun: bool = False


CaptionPieces = list[CaptionPiece]


class NounSpan(NamedTuple):
    """Where a caption names a thing.

    Attributes:
        thing: Index of the thing in the facts.
        start: Index of the first character of the noun.
        stop: Index of the first character after it.
    """

    thing: int
    start: int
    stop: int


def caption(facts: Facts, index: ImageIndex, rng: np.random.Generator | None = None) -> str:
    """Return a caption that states facts, and nothing else.

    The canonical caption states them in one way: "small blue noto apple on the left on a red background",
    "a red cat face to the left of a blue apple", "three rockets". With a generator, the wording varies (see
    `ldm.data.wording`), and emojibase's label or a tag may replace a name.

    Args:
        facts: The facts.
        index: The index of the data set.
        rng: Draws the variations; None for the canonical caption. Default: None.
    """
    return join_captions([caption_pieces(facts, index, rng)])[0]


def join_captions(captions: Sequence[CaptionPieces]) -> list[str]:
    """Join the pieces of each caption."""
    return ["".join(piece.text for piece in pieces) for pieces in captions]


def noun_spans(pieces: CaptionPieces) -> list[NounSpan]:
    """Return where the nouns of a caption stand in the joined text, in the order of the things."""
    found, start = [], 0
    for piece in pieces:
        stop = start + len(piece.text)
        if piece.noun and piece.area in THING_AREAS:
            found.append(NounSpan(THING_AREAS.index(piece.area), start, stop))
        start = stop
    return sorted(found)


def caption_pieces(facts: Facts, index: ImageIndex, rng: np.random.Generator | None = None) -> CaptionPieces:
    """Return the pieces of a `caption`."""
    articles = _articles(facts, rng)
    phrases = {
        "ab"[i]: _thing_pieces(thing, i, facts, index, articles, rng) for i, thing in enumerate(facts.things)
    }
    if facts.relation is None:
        pieces = phrases["a"]
        if facts.place is not None:
            place = _pick(PLACE_PHRASES[facts.place], rng)
            first = rng is not None and rng.random() < PLACE_FIRST
            template = f"{place}, {{a}}" if first else f"{{a}} {place}"
            pieces = _filled(template, {"a": pieces})
    else:
        pieces = _filled(_pick(RELATION_PHRASES[facts.relation], rng), phrases)
    if facts.background is not None:
        template = _pick(BACKGROUND_PHRASES, rng)
        template = template.replace("{a}", _article(facts.background))
        named = f"{facts.background} background" if "{colour} background" in template else facts.background
        template = template.replace("{colour} background", "{colour}")
        pieces = _filled(template, {"x": pieces, "colour": [CaptionPiece(named, "background")]})
    return pieces


def vocabulary(index: ImageIndex) -> set[str]:
    """Return every word (see `words_in`) that a caption of a training image can contain."""
    found = grammar_words()
    for noun in caption_nouns(index):
        found.update(words_in(noun))
    return found


def caption_nouns(index: ImageIndex) -> list[str]:
    """Return the nouns that captions of training images can contain: names, labels, tags and plurals."""
    names = index.names(held_out=False)
    found = dict.fromkeys(noun for name in names for noun in index.nouns(name))
    for name in names:
        for noun in index.counted_nouns(name):
            found.update(dict.fromkeys(filter(None, (plural(noun), plural(uncoloured(noun))))))
    return list(found)


def _pick(phrases: Sequence[str], rng: np.random.Generator | None) -> str:
    """Draw a wording; the canonical one, which is the first, is drawn more often."""
    if rng is None or rng.random() < CANONICAL:
        return phrases[0]
    return phrases[int(rng.integers(len(phrases)))]


def _articles(facts: Facts, rng: np.random.Generator | None) -> str:
    """Return how things are introduced: "a" (or "an"), "the", or "" for no article."""
    if facts.count > 1:
        return ""
    if rng is None:
        return "a" if len(facts.things) == 2 else ""
    draw = rng.random()
    return "the" if draw < THE else "a" if draw < ARTICLE else ""


def _thing_pieces(
    thing: Thing, i: int, facts: Facts, index: ImageIndex, article: str, rng: np.random.Generator | None
) -> CaptionPieces:
    """Return the phrase of a thing: number or article, size, colour, style, noun."""
    number = _pick(COUNTS[facts.count], rng) if facts.count > 1 else ""
    size = _pick(SMALL, rng) if facts.small else ""
    words = [thing.colour or "", thing.style or ""]
    if rng is not None and rng.random() < 0.5:
        words.reverse()
    modifiers = [word for word in (number, size, *words) if word]
    noun = _noun(thing, facts, index, modifiers, rng)
    if article == "a":
        article = _article(" ".join([*modifiers, noun])) if takes_article(noun) else ""
    before = " ".join(modifiers)
    area = THING_AREAS[i]
    return [
        *([CaptionPiece(f"{article} ")] if article else []),
        *([CaptionPiece(f"{before} ", area)] if before else []),
        CaptionPiece(noun, area, noun=True),
    ]


def _noun(
    thing: Thing, facts: Facts, index: ImageIndex, modifiers: Sequence[str], rng: np.random.Generator | None
) -> str:
    """Return the noun of a thing: its name, or a label or tag that means it after these words too."""
    name, noun = thing.name.replace("-", " "), None
    if rng is not None:
        draw = rng.random()
        tags = index.tags.get(thing.name, ()) if facts.count == 1 else ()  # many tags are no nouns
        if draw < TAG and tags:
            noun = tags[rng.integers(len(tags))]
        elif TAG <= draw < TAG + LABEL:
            noun = index.labels.get(thing.name)
    own = _form(name, thing, facts)
    if own is None:
        raise ValueError(f"{thing.name!r}: it has no plural, and the count is {facts.count}")
    form = None if noun is None else _form(noun, thing, facts)
    if form is None or index.names_other(form, thing.name):
        return own
    if any(index.reads_otherwise(word, form) for word in modifiers):
        return own
    return form


def _form(noun: str, thing: Thing, facts: Facts) -> str | None:
    """Return a noun in the number that facts state and, for a recoloured thing, without its own colour."""
    if thing.colour is not None:
        noun = uncoloured(noun)
    return plural(noun) if facts.count > 1 else noun


_FIELD = re.compile(r"\{(\w+)\}")


def _filled(template: str, values: dict[str, CaptionPieces]) -> CaptionPieces:
    """Fill a template's fields with pieces."""
    pieces: CaptionPieces = []
    for i, part in enumerate(_FIELD.split(template)):
        if i % 2:
            pieces += values[part]
        elif part:
            pieces.append(CaptionPiece(part))
    return pieces


_AN = re.compile(r"[aio8]|e(?!u|we)|u(?!ni[^nm]|s|t|r[aeiou]|k|fo)|hour|honest|heir|x\b")
_A = re.compile(r"onc?e\b")


def _article(phrase: str) -> str:
    return "an" if _AN.match(phrase) and not _A.match(phrase) else "a"
