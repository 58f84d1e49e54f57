"""Captions: a description of a composition in words that a rule can check."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ldm.conditioning.words import words_in
from ldm.data.compose import IMAGE_AREAS, PLACES, Area, Composition, Place, SizeWord
from ldm.data.index import STYLES, ImageIndex
from ldm.data.palette import PALETTE

CaptionPieces = list[tuple[str, Area | None]]

# Probabilities of the variations of a caption.
ARTICLE, NAME_NOTO, LABEL, TAG, NAME_MIDDLE = 0.5, 0.25, 0.25, 0.08, 0.25
_PLACE_PHRASE: dict[Place, str] = {
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


def caption(composition: Composition, index: ImageIndex, rng: np.random.Generator | None = None) -> str:
    """Return a caption of a composition.

    The canonical caption has the style (unless it is noto), the name, and every change from the defaults:
    "small red apple on the left on a blue background". With a generator, the caption varies: an article may
    be added, emojibase's label or a tag may replace the name, the style noto may be named, and so may the
    middle as the place of a small image. Changes and the other styles are always named; a background of None
    never is.

    Args:
        composition: The composition.
        index: The index of the data set.
        rng: Draws the variations; None for the canonical caption. Default: None.
    """
    return join_captions([caption_pieces(composition, index, rng)])[0]


def join_captions(captions: Sequence[CaptionPieces]) -> list[str]:
    """Join the pieces of each caption."""
    return [" ".join(text for text, _ in pieces) for pieces in captions]


def caption_pieces(
    composition: Composition, index: ImageIndex, rng: np.random.Generator | None = None
) -> CaptionPieces:
    """Return the pieces of a `caption`, each with the area that it describes (see `coverage`), or None."""
    article = rng is not None and rng.random() < ARTICLE
    name_noto = rng is not None and rng.random() < NAME_NOTO
    rows = [i for i in (composition.image, composition.second) if i is not None]
    phrases = [_noun_phrase(i, composition.size, index, name_noto, rng) for i in rows]
    pieces: CaptionPieces = []
    for area, phrase in zip(IMAGE_AREAS, phrases, strict=False):
        pieces += (
            ([("and", None)] if pieces else [])
            + ([(_article(phrase), None)] if article else [])
            + [(phrase, area)]
        )
    if composition.second is not None:
        pieces.append(("side by side", None))
    elif composition.place != "centre" or (
        composition.size == "small" and rng is not None and rng.random() < NAME_MIDDLE
    ):
        pieces.append((_PLACE_PHRASE[composition.place], None))
    if composition.background is not None:
        pieces += [
            ("on", None),
            (_article(composition.background), None),
            (f"{composition.background} background", "background"),
        ]
    return pieces


def vocabulary(index: ImageIndex) -> set[str]:
    """Return every word (see `words`) that a caption of a training image can contain."""
    found = {"a", "an", "and", "background", "on", "side", "by", "small", *STYLES, *PALETTE}
    for place in PLACES:
        found.update(words_in(_PLACE_PHRASE[place]))
    for noun in caption_nouns(index):
        found.update(words_in(noun))
    return found


def caption_nouns(index: ImageIndex) -> list[str]:
    """Return the nouns that captions of training images can contain: names, labels and tags."""
    return [
        noun for i in index.train for noun in (index[i].phrase, index[i].label or "", *index.caption_tags[i])
    ]


def _noun_phrase(
    i: int, size: SizeWord, index: ImageIndex, name_noto: bool, rng: np.random.Generator | None
) -> str:
    record = index[i]
    noun = record.phrase
    if rng is not None:
        draw = rng.random()
        tags = index.caption_tags[i]
        if draw < TAG and tags:
            noun = tags[rng.integers(len(tags))]
        elif TAG <= draw < TAG + LABEL and record.label:
            noun = record.label
    style = record.style if record.style != "noto" or name_noto else ""
    return " ".join(part for part in ("small" if size == "small" else "", style, noun) if part)


_AN = re.compile(r"[aio8]|e(?!u|we)|u(?!ni[^nm]|s|t|r[aeiou]|k|fo)|hour|honest|heir|x\b")
_A = re.compile(r"onc?e\b")


def _article(phrase: str) -> str:
    return "an" if _AN.match(phrase) and not _A.match(phrase) else "a"
