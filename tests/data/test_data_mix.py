"""Random scenes have the shares of the mix, and nothing held out."""

from collections import Counter

import numpy as np
import pytest

from ldm.data import (
    PALETTE,
    STYLES,
    THING_COLOURS,
    Facts,
    ImageIndex,
    ImageRecord,
    Mix,
    Thing,
    are_held_out,
    sample_facts,
    sample_scene,
)
from ldm.data.facts import PLACES, RELATIONS
from ldm.data.mix import can_be_stated, check_mix

N = 6000
PLAIN = dict.fromkeys(("style", "two", "count", "small", "placed", "colour", "background"), 0.0)


@pytest.fixture(scope="module")
def words() -> ImageIndex:
    """Return an index of invented names that have plurals, in three styles."""
    letters = "bdfgklmnpr"
    names = [f"{a}a{b}o{c}" for a in letters for b in letters for c in letters]
    return ImageIndex(
        ImageRecord(name=name, style=style, held_out=(i + k) % 20 == 0)
        for k, style in enumerate(("noto", "fluent", "twemoji"))
        for i, name in enumerate(names)
    )


def drawn_from(index, mix, n=N, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, index, mix) for _ in range(n)]


def facts_from(index, mix, n=N, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_facts(rng, index, mix) for _ in range(n)]


def test_nothing_held_out_is_drawn(words):
    for scene in drawn_from(words, Mix(background=0.8, colour=0.6)):
        assert not are_held_out(scene.facts)
        for p in scene.placements:
            row, thing = words[p.row], scene.facts.things[p.thing]
            assert not row.held_out and row.name == thing.name and thing.style in (None, row.style)


def test_every_training_image_and_fact_is_drawn(words):
    made = drawn_from(words, Mix(styles={"noto": 1.0}), 12000)
    assert {row for s in made for row in s.rows()} == set(words.train_of["noto"].tolist())
    facts = [s.facts for s in made]
    assert {f.background for f in facts} == {None, *PALETTE}
    assert {f.relation for f in facts} == {None, *RELATIONS} and {f.count for f in facts} == {1, 2, 3, 4}
    assert {f.place for f in facts} == {None, *PLACES}
    assert {t.colour for f in facts for t in f.things} == {None, *THING_COLOURS}


def test_the_shares_are_those_of_the_mix(words):
    mix = Mix(
        styles={"noto": 2.0, "fluent": 1.0, "twemoji": 1.0},
        style=0.3,
        two=0.0,
        count=0.2,
        small=0.3,
        placed=0.25,
        colour=0.0,
        background=0.4,
    )
    made = drawn_from(words, mix)
    facts = [s.facts for s in made]
    shares = {
        0.5: sum(words[s.rows()[0]].style == "noto" for s in made) / N,
        0.25: sum(words[s.rows()[0]].style == "fluent" for s in made) / N,
        0.3: sum(f.things[0].style is not None for f in facts) / N,
        0.2: sum(f.count > 1 for f in facts) / N,
        0.8 * 0.3: sum(f.small for f in facts) / N,
        0.8 * 0.25 + 1e-9: sum(f.place is not None for f in facts) / N,
    }
    for wanted, got in shares.items():
        assert got == pytest.approx(wanted, abs=0.033)  # five standard deviations of 6,000 draws
    # what is held out takes a tenth from named backgrounds, and less from the others
    assert sum(f.background is not None for f in facts) / N == pytest.approx(0.38, abs=0.033)
    backgrounds = Counter(f.background for f in facts if f.background)
    assert max(backgrounds.values()) < 1.6 * min(backgrounds.values())


def test_relations_and_colours_have_their_shares(words):
    facts = facts_from(words, Mix(**{**PLAIN, "two": 1.0, "colour": 0.5}, related=0.6))
    assert sum(f.relation != "and" for f in facts) / N == pytest.approx(0.6, abs=0.033)
    coloured = [t.colour is not None for f in facts for t in f.things]
    assert np.mean(coloured) == pytest.approx(0.5, abs=0.04)


def test_the_plain_mix_has_no_changes(words):
    mix = Mix(**PLAIN)
    assert mix.is_plain and all(f.is_plain for f in facts_from(words, mix, 200))
    assert not Mix().is_plain and not Mix(**{**PLAIN, "colour": 0.1}).is_plain
    assert {f.background for f in facts_from(words, mix, 200)} == {None}


def test_draws_depend_on_the_generator_alone(words):
    mix = Mix()
    assert (
        drawn_from(words, mix, 100, seed=[3, 4])
        == drawn_from(words, mix, 100, seed=[3, 4])
        != drawn_from(words, mix, 100, seed=[3, 5])
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"styles": {"noto": -1.0}}, "at least 0"),
        ({"styles": {"noto": float("nan")}}, "at least 0"),
        ({"styles": {"nato": 1.0}}, "nato"),
        ({"styles": {}}, "positive weight"),
        ({"styles": {"noto": 0.0}}, "positive weight"),
        ({"background": 1.1}, "background 1.1"),
        ({"placed": -0.1}, "placed"),
        ({"two": 0.6, "count": 0.6}, "at most 1"),
        ({"background": float("nan")}, "background nan"),
    ],
)
def test_impossible_mixes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Mix(**wrong)


def test_a_style_without_training_images_is_refused(words):
    fluent = ImageIndex(row for row in words if row.style == "fluent")
    scene = sample_scene(np.random.default_rng(0), fluent, Mix())
    assert fluent[scene.rows()[0]].style == "fluent"
    with pytest.raises(ValueError, match="no training image"):
        sample_scene(np.random.default_rng(0), fluent, Mix(styles={"noto": 1.0}))


def test_a_mix_that_allows_nothing_ends():
    """A single name has no pair, and no plural."""
    index = ImageIndex([ImageRecord(name="rice", style="noto")])
    for wanted in ("two", "count"):
        with pytest.raises(ValueError, match="attempts"):
            sample_facts(np.random.default_rng(0), index, Mix(**{**PLAIN, wanted: 1.0}))


def test_facts_that_a_caption_cannot_state(drawn):
    rows = [
        *drawn.index,
        *(
            ImageRecord(name=name, style="noto")
            for name in (
                "small-airplane",
                "airplane",
                "red-heart",
                "blue-heart",
                "large-blue-gem",
                "flat-ring",
            )
        ),
        *(ImageRecord(name=name, style="noto") for name in ("two-bells", "bell", "rice", "house", "houses")),
    ]
    index = ImageIndex(rows)

    def possible(name, thing=None, **facts):
        return can_be_stated(Facts(things=(Thing(name=name, **(thing or {})),), **facts), index)

    assert possible("airplane") and not possible("airplane", small=True)
    assert not possible("red-heart", {"colour": "blue"}) and possible("red-heart", {"colour": "green"})
    assert not possible("red-heart", {"colour": "red"})  # "red heart" is the name
    assert not possible("large-blue-gem", {"colour": "red"}) and possible("large-blue-gem")
    assert not possible("ring", {"style": "flat"}) and possible("ring", {"style": "noto"})
    assert not possible("bell", count=2) and possible("bell", count=3)
    assert not possible("rice", count=2) and possible("rice", small=True)
    assert not possible("house", count=2) and possible("house")  # "houses" is another name
    assert not possible("ring", {"colour": "blue"}, background="blue")
    assert possible("ring", {"colour": "blue"}, background="red")


def test_every_style_is_drawn_by_default():
    index = ImageIndex(ImageRecord(name="ring", style=style) for style in STYLES)
    made = drawn_from(index, Mix(two=0.0), 300)
    assert {index[s.rows()[0]].style for s in made} == set(STYLES)


def test_things_that_take_no_colour_are_not_recoloured():
    rows = [ImageRecord(name=n, style="noto", tints=n == "ring") for n in ("ring", "ghost", "disc")]
    mix = Mix(**{**PLAIN, "colour": 1.0})
    index = ImageIndex(rows)
    coloured = {f.things[0].name: f.things[0].colour is not None for f in facts_from(index, mix, 300)}
    assert coloured == {"ring": True, "ghost": False, "disc": False}


def test_kinds_of_scenes_that_the_images_do_not_allow_are_refused(words):
    check_mix(Mix(), words)
    rice = ImageIndex([ImageRecord(name="rice", style="noto", tints=False)])
    check_mix(Mix(**PLAIN), rice)
    for name, value in (("two", 0.1), ("count", 0.2), ("colour", 0.3)):
        with pytest.raises(ValueError, match=f"{name} {value}: expected 0, as the 1 training images"):
            check_mix(Mix(**{**PLAIN, name: value}), rice)
    with pytest.raises(ValueError, match="no training image in any style of positive weight"):
        check_mix(Mix(**{**PLAIN, "styles": {"fluent": 1.0}}), rice)
