"""Drawing of compositions: the shares asked for, and nothing held out."""

from collections import Counter

import numpy as np
import pytest

from ldm.data import PALETTE, Mix, PictureIndex, held_out_pair, sample_composition

N = 6000


def drawn_from(index, mix, n=N, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_composition(rng, index, mix) for _ in range(n)]


def test_nothing_held_out_is_drawn(many):
    for made in drawn_from(many, Mix(ground=1.0, small=0.3, two=0.3), 20000):
        for i in (made.picture, made.second):
            if i is not None:
                assert not many[i].held_out
                assert not held_out_pair(many[i].name, made.ground)


def test_every_training_picture_and_allowed_ground_comes(many):
    made = drawn_from(many, Mix(noto=1, fluent=0, twemoji=0, ground=1.0), 40000)
    assert {c.picture for c in made} == set(many.train_of["noto"].tolist())
    assert {c.ground for c in made} == set(PALETTE)


def test_the_shares_are_those_of_the_mix(many):
    mix = Mix(noto=2, fluent=1, twemoji=1, ground=0.4, small=0.3, placed=0.5, two=0.2)
    made = drawn_from(many, mix)
    shares = {
        0.5: sum(many[c.picture].style == "noto" for c in made) / N,
        0.25: sum(many[c.picture].style == "fluent" for c in made) / N,
        0.4: sum(c.ground is not None for c in made) / N,
        0.3: sum(c.size == "small" for c in made) / N,
        0.15: sum(c.place != "centre" for c in made) / N,
        0.2: sum(c.second is not None for c in made) / N,
    }
    for wanted, got in shares.items():
        assert got == pytest.approx(wanted, abs=0.033)  # five standard deviations of 6,000 draws
    assert all(many[c.picture].style == many[c.second].style for c in made if c.second is not None)
    grounds = Counter(c.ground for c in made if c.ground)
    assert max(grounds.values()) < 1.6 * min(grounds.values())
    assert len({c.place for c in made}) == 9


def test_the_plain_mix_is_the_source(many):
    made = drawn_from(many, Mix(ground=0, small=0, two=0), 200)
    assert {(c.second, c.ground, c.size, c.place) for c in made} == {(None, None, "full", "centre")}


def test_draws_depend_on_the_generator_alone(many):
    mix = Mix(small=0.2, two=0.2)
    assert (
        drawn_from(many, mix, 100, seed=[3, 4])
        == drawn_from(many, mix, 100, seed=[3, 4])
        != drawn_from(many, mix, 100, seed=[3, 5])
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"noto": -1.0},
        {"noto": 0, "fluent": 0, "twemoji": 0},
        {"ground": 1.1},
        {"placed": -0.1},
        {"small": 0.6, "two": 0.6},
        {"ground": float("nan")},
    ],
)
def test_impossible_mixes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Mix(**wrong)


def test_a_style_that_is_not_there_is_refused(many):
    fluent = PictureIndex(row for row in many if row.style == "fluent")
    assert fluent[sample_composition(np.random.default_rng(0), fluent, Mix()).picture].style == "fluent"
    with pytest.raises(ValueError, match="no training picture"):
        sample_composition(np.random.default_rng(0), fluent, Mix(fluent=0))
