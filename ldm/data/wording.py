"""The words by which captions state facts: tables that a parser of prompts can read too.

The first wording of each fact is the canonical one. {a} and {b} stand for the phrases of the first and the
second thing.
"""

from __future__ import annotations

from ldm.conditioning.words import words_in
from ldm.data.facts import STYLES, Place, Relation
from ldm.data.palette import PALETTE

COUNTS: dict[int, tuple[str, ...]] = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
SMALL: tuple[str, ...] = ("small", "little", "tiny")
PLACE_PHRASES: dict[Place, tuple[str, ...]] = {
    "centre": ("in the middle", "in the centre", "in the center"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "on the top", "in the upper half"),
    "bottom": ("at the bottom", "on the bottom", "in the lower half"),
    "top left": ("in the top left corner", "at the top left", "in the upper left corner"),
    "top right": ("in the top right corner", "at the top right", "in the upper right corner"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left corner"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right corner"),
}
RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "and": ("{a} and {b}", "{a}, {b}", "{a} & {b}", "{a} together with {b}"),
    "beside": ("{a} next to {b}", "{a} beside {b}", "{a} and {b} side by side", "{a} alongside {b}"),
    "left": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{a} on the left of {b}",
        "{b} to the right of {a}",
        "{a} on the left and {b} on the right",
        "{b} with {a} on its left",
        "on the left {a}, on the right {b}",
    ),
    "right": (
        "{a} to the right of {b}",
        "{a} right of {b}",
        "{a} on the right of {b}",
        "{b} to the left of {a}",
        "{a} on the right and {b} on the left",
        "{b} with {a} on its right",
        "on the right {a}, on the left {b}",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{a} on top of {b}",
        "{b} below {a}",
        "{a} at the top and {b} at the bottom",
        "{b} with {a} above it",
    ),
    "below": (
        "{a} below {b}",
        "{a} under {b}",
        "{a} underneath {b}",
        "{a} beneath {b}",
        "{b} above {a}",
        "{a} at the bottom and {b} at the top",
        "{b} with {a} below it",
    ),
}
# {x} stands for the rest of the caption, {a} for an article, {colour} for the background's
BACKGROUND_PHRASES: tuple[str, ...] = (
    "{x} on {a} {colour} background",
    "{x} on {colour} background",
    "{x} on {colour}",
    "{x} against {a} {colour} background",
    "{x} in front of {a} {colour} background",
    "{x}, {colour} background",
    "{colour} background, {x}",
    "on {a} {colour} background, {x}",
)


def grammar_words() -> set[str]:
    """Return every word (see `words_in`) that states a fact, articles and colours included."""
    found = {"a", "an", "the", *PALETTE, *SMALL}
    tables = (
        *PLACE_PHRASES.values(),
        *RELATION_PHRASES.values(),
        *COUNTS.values(),
        STYLES,
        BACKGROUND_PHRASES,
    )
    for phrases in tables:
        for phrase in phrases:
            found.update(words_in(phrase.format(a="", b="", x="", colour="")))
    return found
