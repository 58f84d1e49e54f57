"""Random compositions have the shares of the mix, and nothing held out."""

from collections import Counter

import numpy as np
import pytest

from ldm.data import PALETTE, ImageIndex, Mix, held_out_pair, sample_composition

N = 6000


def drawn_from(index, mix, n=N, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_composition(rng, index, mix) for _ in range(n)]


def test_nothing_held_out_is_drawn(many):
    for made in drawn_from(many, Mix(background=1.0, small=0.3, two=0.3), 20000):
        for i in (made.image, made.second):
            if i is not None:
                assert not many[i].held_out
                assert not held_out_pair(many[i].name, made.background)


def test_every_training_image_and_background_is_drawn(many):
    made = drawn_from(many, Mix(noto=1, fluent=0, twemoji=0, background=1.0), 40000)
    assert {c.image for c in made} == set(many.train_of["noto"].tolist())
    assert {c.background for c in made} == set(PALETTE)


def test_the_shares_are_those_of_the_mix(many):
    mix = Mix(noto=2, fluent=1, twemoji=1, background=0.4, small=0.3, placed=0.5, two=0.2)
    made = drawn_from(many, mix)
    shares = {
        0.5: sum(many[c.image].style == "noto" for c in made) / N,
        0.25: sum(many[c.image].style == "fluent" for c in made) / N,
        0.4: sum(c.background is not None for c in made) / N,
        0.3: sum(c.size == "small" for c in made) / N,
        0.15: sum(c.place != "centre" for c in made) / N,
        0.2: sum(c.second is not None for c in made) / N,
    }
    for wanted, got in shares.items():
        assert got == pytest.approx(wanted, abs=0.033)  # five standard deviations of 6,000 draws
    assert all(many[c.image].style == many[c.second].style for c in made if c.second is not None)
    backgrounds = Counter(c.background for c in made if c.background)
    assert max(backgrounds.values()) < 1.6 * min(backgrounds.values())
    assert len({c.place for c in made}) == 9


def test_the_plain_mix_has_no_changes(many):
    made = drawn_from(many, Mix(background=0, small=0, two=0), 200)
    assert {(c.second, c.background, c.size, c.place) for c in made} == {(None, None, "full", "centre")}


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
        {"background": 1.1},
        {"placed": -0.1},
        {"small": 0.6, "two": 0.6},
        {"background": float("nan")},
    ],
)
def test_impossible_mixes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Mix(**wrong)


def test_a_style_without_training_images_is_refused(many):
    fluent = ImageIndex(row for row in many if row.style == "fluent")
    assert fluent[sample_composition(np.random.default_rng(0), fluent, Mix()).image].style == "fluent"
    with pytest.raises(ValueError, match="no training image"):
        sample_composition(np.random.default_rng(0), fluent, Mix(fluent=0))
