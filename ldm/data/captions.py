"""Captions: what a composition shows, said in words that a rule can check."""

from __future__ import annotations

import re

import numpy as np

from ldm.data.compose import PLACES, Composition, Place
from ldm.data.index import STYLES, PictureIndex
from ldm.data.palette import PALETTE

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


def words(text: str) -> list[str]:
    """The words of a text, lower-case, in order: runs of letters and digits, with their apostrophes."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


def caption(composition: Composition, index: PictureIndex, rng: np.random.Generator | None = None) -> str:
    """What a composition shows, in words.

    Without a generator the canonical caption: name, style first unless it is noto, and every change made ("small red apple on the left on a blue
    background"). With one, articles come and go, the name may give way to emojibase's label or a tag, noto may be said. Changes and the styles
    other than noto are always said; what is as in the source (white ground, full size, centred) is not.
    """
    article = rng is not None and rng.random() < ARTICLE
    things = [_thing(composition.picture, composition, index, article, rng)]
    if composition.second is not None:
        things.append(_thing(composition.second, composition, index, article, rng))
    text = " and ".join(things)
    if composition.second is not None:
        text += " side by side"
    elif composition.place != "centre" or (composition.size == "small" and rng is not None and rng.random() < MIDDLE_SAID):
        text += " " + _WHERE[composition.place]
    if composition.ground is not None:
        text += f" on {_with_article(composition.ground)} background"
    return text


def vocabulary(index: PictureIndex) -> set[str]:
    """Every word (see ``words``) that a caption of a training picture can contain."""
    found = {"a", "an", "and", "background", "on", "side", "by", "small", *STYLES, *PALETTE}
    for place in PLACES:
        found.update(words(_WHERE[place]))
    for i in index.train:
        found.update(word for noun in (index[i].phrase, index[i].label or "", *index.said_tags[i]) for word in words(noun))
    return found


def _thing(i: int, composition: Composition, index: PictureIndex, article: bool, rng: np.random.Generator | None) -> str:
    picture = index[i]
    noun, say_style = picture.phrase, picture.style != "noto"
    if rng is not None:
        say_style = rng.random() < NOTO_SAID or say_style
        draw = rng.random()
        tags = index.said_tags[i]
        if draw < TAG and tags:
            noun = tags[rng.integers(len(tags))]
        elif TAG <= draw < TAG + LABEL and picture.label:
            noun = picture.label
    small = "small" if composition.size == "small" else ""
    phrase = " ".join(part for part in (small, picture.style if say_style else "", noun) if part)
    return _with_article(phrase) if article else phrase


def _with_article(phrase: str) -> str:
    first = phrase.split()[0]
    vowel = first[0] in "aeio8" or (first[0] == "u" and not re.match(r"uni[^nm]|us|ut|ur[aeiou]|uk", first))
    return f"{'an' if vowel and not re.match(r'eu|one', first) else 'a'} {phrase}"
