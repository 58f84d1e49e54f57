"""Captions: what a composition shows, said in words that a rule can check."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ldm.conditioning.words import words
from ldm.data.compose import PLACES, THINGS, Area, Composition, Place, SizeWord
from ldm.data.index import STYLES, PictureIndex
from ldm.data.palette import PALETTE

Pieces = list[tuple[str, Area | None]]

# How a caption varies (shares of captions drawn with a generator).
ARTICLE, NOTO_SAID, LABEL, TAG, MIDDLE_SAID = 0.5, 0.25, 0.25, 0.08, 0.25
_WHERE: dict[Place, str] = {
    "centre": "in the middle",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "top left": "in the top left corner",
    "top right": "in the top right corner",
    "bottom left": "in the bottom left corner",
    "bottom right": "in the bottom right corner",
}


def caption(composition: Composition, index: PictureIndex, rng: np.random.Generator | None = None) -> str:
    """What a composition shows, in words.

    Without a generator the canonical caption: name, style first unless it is noto, and every change made
    ("small red apple on the left on a blue background"). With one, articles come and go, the name may give
    way to emojibase's label or a tag, noto may be said, and so may the middle of a small picture. Changes and
    the styles other than noto are always said; a white ground that is None never is.
    """
    return spoken([pieces(composition, index, rng)])[0]


def spoken(said: Sequence[Pieces]) -> list[str]:
    """The captions that pieces make."""
    return [" ".join(text for text, _ in pieces) for pieces in said]


def pieces(composition: Composition, index: PictureIndex, rng: np.random.Generator | None = None) -> Pieces:
    """The pieces of a composition's `caption`, each with the area of the picture that it tells of (see
    `areas`), None for such as tell of none."""
    article = rng is not None and rng.random() < ARTICLE
    say_noto = rng is not None and rng.random() < NOTO_SAID
    shown = [i for i in (composition.picture, composition.second) if i is not None]
    things = [_thing(i, composition.size, index, say_noto, rng) for i in shown]
    made: Pieces = []
    for area, thing in zip(THINGS, things, strict=False):
        made += (
            ([("and", None)] if made else [])
            + ([(_article(thing), None)] if article else [])
            + [(thing, area)]
        )
    if composition.second is not None:
        made.append(("side by side", None))
    elif composition.place != "centre" or (
        composition.size == "small" and rng is not None and rng.random() < MIDDLE_SAID
    ):
        made.append((_WHERE[composition.place], None))
    if composition.ground is not None:
        made += [
            ("on", None),
            (_article(composition.ground), None),
            (f"{composition.ground} background", "ground"),
        ]
    return made


def vocabulary(index: PictureIndex) -> set[str]:
    """Every word (see ``words``) that a caption of a training picture can contain."""
    found = {"a", "an", "and", "background", "on", "side", "by", "small", *STYLES, *PALETTE}
    for place in PLACES:
        found.update(words(_WHERE[place]))
    for i in index.train:
        found.update(
            word
            for noun in (index[i].phrase, index[i].label or "", *index.said_tags[i])
            for word in words(noun)
        )
    return found


def _thing(
    i: int, size: SizeWord, index: PictureIndex, say_noto: bool, rng: np.random.Generator | None
) -> str:
    picture = index[i]
    noun = picture.phrase
    if rng is not None:
        draw = rng.random()
        tags = index.said_tags[i]
        if draw < TAG and tags:
            noun = tags[rng.integers(len(tags))]
        elif TAG <= draw < TAG + LABEL and picture.label:
            noun = picture.label
    style = picture.style if picture.style != "noto" or say_noto else ""
    return " ".join(part for part in ("small" if size == "small" else "", style, noun) if part)


_AN = re.compile(r"[aio8]|e(?!u|we)|u(?!ni[^nm]|s|t|r[aeiou]|k|fo)|hour|honest|heir|x\b")
_A = re.compile(r"onc?e\b")


def _article(phrase: str) -> str:
    return "an" if _AN.match(phrase) and not _A.match(phrase) else "a"
