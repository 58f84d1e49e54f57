"""Captions describe every change of a composition, and nothing else."""

import numpy as np
import pytest

from ldm.conditioning.words import words_in
from ldm.data import PALETTE, Composition, Mix, caption, sample_composition, vocabulary
from ldm.data.captions import _article, caption_pieces


@pytest.mark.parametrize(
    ("name", "style", "changes", "expected"),
    [
        ("red-disc", "noto", {}, "red disc"),
        ("red-disc", "fluent", {}, "fluent red disc"),
        ("red-disc", "noto", {"background": "blue"}, "red disc on a blue background"),
        ("ring", "twemoji", {"background": "orange"}, "twemoji ring on an orange background"),
        ("ring", "noto", {"background": "white"}, "ring on a white background"),
        ("ring", "noto", {"size": "small"}, "small ring"),
        (
            "ring",
            "noto",
            {"size": "small", "place": "left", "background": "blue"},
            "small ring on the left on a blue background",
        ),
        (
            "ring",
            "fluent",
            {"size": "small", "place": "top right"},
            "small fluent ring in the top right corner",
        ),
        ("ring", "noto", {"second": 0}, "ring and red disc side by side"),
    ],
)
def test_canonical_captions(drawn, name, style, changes, expected):
    assert caption(Composition(image=drawn.find(name, style), **changes), drawn.index) == expected


def test_the_style_of_both_images_is_named(drawn):
    both = Composition(image=drawn.find("ring", "fluent"), second=drawn.find("red-disc", "fluent"))
    assert caption(both, drawn.index) == "fluent ring and fluent red disc side by side"


def test_varied_captions_have_all_wordings_and_no_other(drawn):
    rng = np.random.default_rng(0)
    got = {
        caption(Composition(image=drawn.find("cat-face"), background="red"), drawn.index, rng)
        for _ in range(600)
    }
    nouns = ("cat face", "kitty", "cat")
    assert got == {
        f"{article}{style}{noun} on a red background"
        for article in ("", "a ")
        for style in ("", "noto ")
        for noun in nouns
    }
    got = {
        caption(Composition(image=drawn.find("ring", "twemoji"), size="small"), drawn.index, rng)
        for _ in range(600)
    }
    assert got == {
        f"{a}small twemoji {noun}{where}"
        for a in ("", "a ")
        for noun in ("ring", "hoop")
        for where in ("", " in the middle")
    }


def test_varied_captions_describe_every_change(drawn):
    rng = np.random.default_rng(1)
    mix = Mix(background=0.5, small=0.4, two=0.3)
    where = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
    for _ in range(500):
        made = sample_composition(rng, drawn.index, mix)
        text = caption(made, drawn.index, rng)
        style = drawn.index[made.image].style
        assert all((other in words_in(text)) == (other == style) for other in ("fluent", "twemoji"))
        assert style == "noto" or words_in(text).count(style) == (1 if made.second is None else 2)
        assert [colour for colour in PALETTE if f"{colour} background" in text] == (
            [made.background] if made.background else []
        )
        assert ("small" in words_in(text)) == (made.size == "small")
        assert ("side by side" in text) == (made.second is not None)
        assert made.place == "centre" or where.get(made.place, f"in the {made.place} corner") in text
        assert ("background" in text) == (made.background is not None)


def test_captions_depend_on_the_generator_alone(drawn):
    made = [Composition(image=i) for i in range(18)] * 3
    one, two = (
        [caption(c, drawn.index, rng) for c in made]
        for rng in (np.random.default_rng(7), np.random.default_rng(7))
    )
    assert one == two != [caption(c, drawn.index, np.random.default_rng(8)) for c in made]


def test_vocabulary_has_every_word_of_training_captions(drawn):
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(3000):
        seen.update(
            words_in(caption(sample_composition(rng, drawn.index, Mix(small=0.5, two=0.2)), drawn.index, rng))
        )
    assert seen == vocabulary(drawn.index)


def test_words():
    assert words_in("A Woman’s T-shirt, on 1st!") == ["a", "woman's", "t", "shirt", "on", "1st"]


@pytest.mark.parametrize(
    "phrase", "apple,orange,umbrella,unamused face,hourglass,onion,8ball,x ray,eye,elf".split(",")
)
def test_an(phrase):
    assert _article(phrase) == "an"


@pytest.mark.parametrize(
    "phrase", "bee,unicorn,ewe,euro,one piece swimsuit,house,ufo,yo yo,wheel,xylophone,100".split(",")
)
def test_a(phrase):
    assert _article(phrase) == "a"


def test_pieces_name_the_area_that_they_describe(drawn):
    both = Composition(
        image=drawn.find("ring", "fluent"), second=drawn.find("red-disc", "fluent"), background="orange"
    )
    assert caption_pieces(both, drawn.index) == [
        ("fluent ring", "first"),
        ("and", None),
        ("fluent red disc", "second"),
        ("side by side", None),
        ("on", None),
        ("an", None),
        ("orange background", "background"),
    ]
    small = caption_pieces(Composition(image=drawn.find("ring"), size="small", place="left"), drawn.index)
    assert small == [("small ring", "first"), ("on the left", None)]
