"""Finding the things that a prompt names."""

from __future__ import annotations

import pytest

from ldm.conditioning.things import Lexicon, Mention

LEXICON = Lexicon(
    nouns={
        "kitty": ("cat", "cat-face"),
        "cat": ("cat",),
        "cat face": ("cat-face",),
        "cat faces": ("cat-face",),
        "red apple": ("red-apple",),
        "apple": ("red-apple", "green-apple"),
        "orange": ("tangerine",),
        "left arrow": ("left-arrow",),
        "my robot": ("my-robot",),
    },
    styles=("noto", "noto-v1", "fluent"),
    grammar=frozenset("a an the blue red orange on background and to left of three".split()),
)


def read(text: str, slots: int = 2):
    return LEXICON.read(text, slots=slots)


@pytest.mark.parametrize(
    ("text", "slotted", "phrases"),
    [
        ("a blue cat face", "a blue alpha", ["cat face"]),
        ("A Blue CAT FACE!", "a blue alpha", ["cat face"]),
        ("a red apple and a cat", "a alpha and a beta", ["red apple", "cat"]),
        ("three cat faces on a red background", "three alpha on a red background", ["cat faces"]),
        ("a cat to the left of a left arrow", "a alpha to the left of a beta", ["cat", "left arrow"]),
        ("an orange apple", "an orange alpha", ["apple"]),  # a word of grammar alone is no thing
        ("my robot", "alpha", ["my robot"]),
        ("", "", []),
    ],
)
def test_the_longest_phrase_is_a_thing(text: str, slotted: str, phrases: list[str]):
    found = read(text)
    assert found.text == slotted
    assert [mention.phrase for mention in found.mentions] == phrases
    assert found.unknown == ()


def test_a_style_belongs_to_the_thing_after_it_and_is_not_read_by_the_tower():
    found = read("a fluent cat and a noto-v1 blue apple")
    assert found.text == "a alpha and a blue beta"
    assert found.mentions == (
        Mention(phrase="cat", names=("cat",), style="fluent"),
        Mention(phrase="apple", names=("red-apple", "green-apple"), style="noto-v1"),
    )
    assert [mention.style for mention in read("noto cat and a apple").mentions] == ["noto", None]


def test_unknown_words_are_named_once_and_left_out():
    found = read("a zeppelin on a cat on a zeppelin")
    assert found.text == "a on a alpha on a" and found.unknown == ("zeppelin",)


def test_things_beyond_the_slots_are_named():
    found = read("a cat and a apple and a red apple", slots=2)
    assert found.text == "a alpha and a beta and a" and found.unknown == ("red apple",)


def test_slots_go_on_from_earlier_parts():
    first = read("a cat and")
    second = LEXICON.read("a apple", slots=2, taken=first.mentions)
    assert second.text == "a beta" and len(second.mentions) == 2


def test_a_phrase_that_is_a_name_means_that_name_alone():
    lexicon = Lexicon(
        nouns={"cat face": ("cat-face",), "cat-face": ("disc",), "kitty": ("cat-face", "disc")},
        styles=(),
        grammar=frozenset(),
    )
    assert lexicon.read("Cat-face", slots=1).mentions[0].names == ("cat-face",)
    assert lexicon.read("kitty", slots=1).mentions[0].names == ("cat-face", "disc")


def test_long_texts_take_time_in_proportion():
    text = "a cat face and a zeppelin " * 4000
    assert read(text).unknown == ("cat face", "zeppelin") or len(read(text).mentions) == 2


def test_slot_words_cannot_be_grammar():
    with pytest.raises(ValueError, match=r"expected none of the slot words, got \['alpha'\]"):
        Lexicon(nouns={}, styles=(), grammar=frozenset({"alpha", "a"}))
