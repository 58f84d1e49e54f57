"""The library of exemplars: what it chooses, and what it accepts."""

from __future__ import annotations

import pytest
import torch
from image_mutations import png_of

from ldm.conditioning.exemplar_library import Exemplar, ExemplarLibrary, read_exemplar, write_exemplar
from ldm.conditioning.things import Mention


def image(seed: int, size: int = 16) -> torch.Tensor:
    levels = torch.randint(0, 256, (4, size, size), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def library() -> ExemplarLibrary:
    exemplars = [
        Exemplar(name=name, style=style, content=write_exemplar(image(i)))
        for i, (name, style) in enumerate(
            [("cat", "noto"), ("cat", "fluent"), ("cat", "flat"), ("dog", "noto")]
        )
    ]
    return ExemplarLibrary(exemplars, {"pet": ("cat", "dog")}, size=16)


def test_images_are_stored_exactly():
    pixels = image(0)
    assert torch.equal(read_exemplar(write_exemplar(pixels), 16), pixels)


def test_the_seed_chooses_and_nothing_else():
    mention = Mention(phrase="cat", names=("cat",))
    chosen = [library().choose(mention, seed, 0).style for seed in range(60)]
    assert chosen == [library().choose(mention, seed, 0).style for seed in range(60)]
    assert all(chosen.count(style) >= 10 for style in ("noto", "fluent", "flat"))
    assert chosen != [library().choose(mention, seed, 1).style for seed in range(60)]


def test_a_style_that_is_asked_for_is_kept_where_there_is_an_image_of_it():
    asked = Mention(phrase="cat", names=("cat",), style="flat")
    assert {library().choose(asked, seed, 0).style for seed in range(20)} == {"flat"}
    absent = Mention(phrase="dog", names=("dog",), style="flat")
    assert {library().choose(absent, seed, 0).style for seed in range(5)} == {"noto"}


def test_a_noun_may_mean_several_names():
    pet = Mention(phrase="pet", names=("cat", "dog"))
    assert {library().choose(pet, seed, 0).name for seed in range(20)} == {"cat", "dog"}


def test_an_image_of_ones_own_is_found_by_its_name_and_can_be_removed():
    own = library()
    own.add("My Robot", image(9), nouns=("my robots",))
    assert own.nouns["my robot"] == own.nouns["my robots"] == ("my-robot",)
    assert own.styles == ["noto", "fluent", "flat", "own"] and len(own) == 5
    chosen = own.choose(Mention(phrase="my robot", names=("my-robot",)), 3, 0)
    assert torch.equal(own.pixels(chosen), image(9))
    own.add("my robot", image(8))  # replaces the image of the same style
    assert len(own) == 5 and torch.equal(
        own.pixels(own.choose(Mention(phrase="", names=("my-robot",)), 0, 0)), image(8)
    )
    own.remove("my robot")
    assert len(own) == 4 and "my robot" not in own.nouns and "my robots" not in own.nouns
    own.remove("dog")
    assert own.nouns["pet"] == ("cat",)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="two exemplars of 'cat' in style 'noto'"):
        ExemplarLibrary([*library(), *library()], {}, size=16)
    with pytest.raises(ValueError, match="noun 'bird': expected at least one name that it means"):
        ExemplarLibrary([], {"bird": ()}, size=16)
    with pytest.raises(ValueError, match="noun 'bird' means 'bird', of which there is no exemplar"):
        ExemplarLibrary([], {"bird": ("bird",)}, size=16)
    for size in (0, -1, 2**31 - 1, 16.5):
        with pytest.raises(ValueError, match="size: expected a whole number from 1 to 2048"):
            ExemplarLibrary([], {}, size=size)
    with pytest.raises(ValueError, match=r"expected \(4, 16, 16\)"):
        library().add("robot", image(0)[:3])
    with pytest.raises(ValueError, match="name '--': expected letters or digits"):
        library().add("--", image(0))
    long, own = "a " * 101, library()
    for add in (
        lambda: own.add("robot", image(0), nouns=(long,)),
        lambda: own.add("x" + long, image(0)),
        lambda: ExemplarLibrary(list(library()), {long: ("cat",)}, size=16),
    ):
        with pytest.raises(ValueError, match="noun '.*: expected at most 200 characters, got 20"):
            add()
    assert len(own) == 4 and own.nouns == library().nouns
    with pytest.raises(ValueError, match="no exemplar of 'cot'; did you mean 'cat'"):
        library().remove("cot")
    headers = (b"\0", b"\x7f\xff\xff\xff" * 2 + b"\x08\2\0\0\0")  # truncated; 2³¹ − 1 pixels wide and high
    for content in (b"GIF89a", *(png_of([(b"IHDR", header)]) for header in headers)):
        with pytest.raises(ValueError, match="exemplar: no readable WebP or PNG image"):
            read_exemplar(content, 16)
    with pytest.raises(ValueError, match=r"exemplar of \(16, 16\) pixels: expected \(8, 8\)"):
        read_exemplar(write_exemplar(image(0)), 8)
