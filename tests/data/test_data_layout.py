"""Layouts obey the facts, stay inside the canvas, and use the rest of their freedom."""

import itertools

import numpy as np
import pytest

from ldm.data import Facts, Thing, draw_layout, plain_scene, side_by_side
from ldm.data.facts import PLACES, RELATIONS
from ldm.data.layout import JITTER, MARGIN, place_centre

N = 400


def layouts(index, n=N, seed=0, **facts):
    rng = np.random.default_rng(seed)
    return [draw_layout(Facts(**facts), index, rng) for _ in range(n)]


def extent(p):
    a = np.radians(abs(p.tilt))
    return p.side * (np.cos(a) + np.sin(a)) / 2


def assert_inside_and_apart(scene):
    for p in scene.placements:
        e = extent(p)
        assert e - 1e-9 <= min(p.x, p.y) and max(p.x, p.y) <= 1 - e + 1e-9
    for p, q in itertools.combinations(scene.placements, 2):
        assert max(abs(p.x - q.x), abs(p.y - q.y)) >= (p.side + q.side) / 2 - 1e-9


ONE = (Thing(name="red-disc"),)
BOTH = (Thing(name="red-disc"), Thing(name="old-cross"))


def test_a_single_thing_fills_most_of_the_canvas(drawn):
    made = [scene.placements for scene in layouts(drawn.index, things=ONE)]
    assert {len(p) for p in made} == {1}
    sides = [p.side for (p,) in made]
    assert 0.8 <= min(sides) < 0.82 and 0.98 < max(sides) <= 1.0
    tilts = np.array([p.tilt for (p,) in made])
    assert np.mean(tilts == 0) == pytest.approx(0.5, abs=0.13) and 7 < np.abs(tilts).max() <= 8
    for scene in layouts(drawn.index, things=ONE):
        assert_inside_and_apart(scene)
    assert {drawn.index[p.row].style for (p,) in made} == {"noto", "fluent", "twemoji"}


@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("small", [False, True])
def test_small_and_placed_things(drawn, place, small):
    if place is None and not small:
        return
    high = 0.52 if small else 0.6
    centres = []
    for scene in layouts(drawn.index, things=ONE, small=small, place=place):
        (p,) = scene.placements
        assert_inside_and_apart(scene)
        assert 0.42 <= p.side <= high
        if place is not None:
            wanted = place_centre(place, p.side)
            margin = extent(p) - p.side / 2  # a tilted thing keeps its corners inside
            assert max(abs(p.x - wanted[0]), abs(p.y - wanted[1])) <= JITTER + max(0, margin - MARGIN) + 1e-9
        centres.append((p.x, p.y))
    assert np.std(centres, axis=0).min() > (0.1 if place is None else 0.003)


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_things_stand_as_their_relation_says(drawn, relation):
    dx, dy = [], []
    for scene in layouts(drawn.index, things=BOTH, relation=relation):
        assert_inside_and_apart(scene)
        a, b = scene.placements
        assert (a.thing, b.thing) == (0, 1) and drawn.index[a.row].name == "red-disc"
        assert all(0.42 <= p.side <= 0.52 for p in (a, b))
        dx.append(b.x - a.x)
        dy.append(b.y - a.y)
    dx, dy = np.array(dx), np.array(dy)
    beside, stacked = np.abs(dy) < 0.11, np.abs(dx) < 0.11
    if relation in ("left", "right"):
        assert beside.all() and ((dx if relation == "left" else -dx) > 0.4).all()
    elif relation in ("above", "below"):
        assert stacked.all() and ((dy if relation == "above" else -dy) > 0.4).all()
    elif relation == "beside":
        assert beside.all() and 0.4 < (dx > 0).mean() < 0.6
    else:
        kinds = [beside.mean(), stacked.mean(), (~beside & ~stacked).mean()]
        assert min(kinds) > 0.25 and 0.4 < (dx > 0).mean() < 0.6 and 0.4 < (dy > 0).mean() < 0.6


@pytest.mark.parametrize("count", [2, 3, 4])
def test_counted_things_repeat_one_image(drawn, count):
    shapes = set()
    for scene in layouts(drawn.index, things=ONE, count=count):
        assert_inside_and_apart(scene)
        assert len(scene.placements) == count and len({(p.row, p.side) for p in scene.placements}) == 1
        side = scene.placements[0].side
        assert 0.31 <= side <= 0.33 if side < 0.35 else 0.36 <= side <= 0.48
        width, height = (np.ptp([getattr(p, axis) for p in scene.placements]) for axis in "xy")
        shapes.add((width > side * 0.7, height > side * 0.7, side < 0.35))
    assert len(shapes) >= {2: 3, 3: 3, 4: 1}[count]


def test_a_stated_style_is_shown_and_an_open_one_is_trained(drawn):
    ring = Thing(name="ring")
    styles = {drawn.index[s.rows()[0]].style for s in layouts(drawn.index, things=(ring,))}
    assert styles == {"noto", "twemoji"}  # (ring, fluent) is held out
    stated = layouts(drawn.index, 5, things=(Thing(name="ring", style="fluent"),))
    assert {drawn.index[s.rows()[0]].style for s in stated} == {"fluent"}


def test_styles_have_their_weights(drawn):
    rng = np.random.default_rng(0)
    made = [
        draw_layout(Facts(things=ONE), drawn.index, rng, styles={"noto": 3, "twemoji": 1}) for _ in range(N)
    ]
    styles = [drawn.index[s.rows()[0]].style for s in made]
    assert set(styles) == {"noto", "twemoji"} and styles.count("noto") == pytest.approx(300, abs=45)


def test_a_thing_without_images_is_refused(drawn):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no training image of this name"):
        draw_layout(Facts(things=(Thing(name="zeppelin"),)), drawn.index, rng)
    with pytest.raises(ValueError, match="any style of positive weight"):
        draw_layout(Facts(things=ONE), drawn.index, rng, styles={"fxemoji": 1})
    with pytest.raises(ValueError, match="no image named"):
        draw_layout(Facts(things=(Thing(name="red-disc", style="flat"),)), drawn.index, rng)


def test_layouts_depend_on_the_generator_alone(drawn):
    one, two, other = (layouts(drawn.index, 20, seed, things=BOTH, relation="and") for seed in (3, 3, 4))
    assert one == two != other


def test_whole_images_and_pairs_of_halves(drawn):
    one = plain_scene(drawn.index, 7, "blue")
    assert one.facts.is_plain and one.facts.things[0].style == "fluent" and one.rows() == [7]
    assert (one.placements[0].side, one.placements[0].x, one.placements[0].tilt) == (1.0, 0.5, 0.0)
    pair = side_by_side(drawn.index, 0, 4)
    assert pair.facts.relation == "left" and (pair.rows(0), pair.rows(1)) == ([0], [4])
    assert [(p.x, p.y, p.side) for p in pair.placements] == [(0.25, 0.5, 0.5), (0.75, 0.5, 0.5)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"things": ()}, "expected one, or two"),
        ({"things": (ONE[0], ONE[0]), "relation": "and"}, "different names"),
        ({"things": BOTH}, "relation None"),
        ({"things": ONE, "relation": "left"}, "for two things only"),
        ({"things": BOTH, "relation": "lef"}, "did you mean 'left'"),
        ({"things": BOTH, "relation": "left", "small": True}, "several things"),
        ({"things": BOTH, "relation": "left", "count": 2}, "count 2"),
        ({"things": ONE, "count": 2, "place": "left"}, "several things"),
        ({"things": ONE, "count": 5}, "expected 1 to 4"),
        ({"things": ONE, "count": 0}, "expected 1 to 4"),
        ({"things": ONE, "background": "blu"}, "did you mean 'blue'"),
        ({"things": ONE, "place": "botom"}, "did you mean 'bottom'"),
    ],
)
def test_impossible_facts_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Facts(**wrong)


def test_impossible_things_are_refused():
    with pytest.raises(ValueError, match="did you mean 'fluent'"):
        Thing(name="ring", style="fluant")
    with pytest.raises(ValueError, match="colour 'white'"):
        Thing(name="ring", colour="white")
