"""Layout: what a prompt leaves open, drawn at random.

Which image shows each thing, how large it is, where it stands and how it is tilted.
Lengths are fractions of the canvas. A placement is a square around a whole source image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ldm.data.facts import Facts, Place, Relation, Style, Thing
from ldm.data.index import ImageIndex

FULL, SMALL_SIDE, PLACED_SIDE = (0.8, 1.0), (0.42, 0.52), (0.42, 0.6)  # ranges of sides
COUNTED_SIDE, LINE_OF_THREE = (0.36, 0.48), (0.31, 0.33)
TILT, JITTER, MARGIN = 8.0, 0.03, 1 / 32  # degrees; about a place; from the border
LEVEL = 0.05  # how far things in one row stand from a common height

Centre = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One image on the canvas.

    Args:
        thing: Index of the thing in the facts.
        row: Row of the image in the index.
        x: Horizontal centre, from the left.
        y: Vertical centre, from the top.
        side: Width and height.
        tilt: Degrees counterclockwise. Default: 0.
    """

    thing: int
    row: int
    x: float
    y: float
    side: float
    tilt: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an image shows: the facts that its caption states, and the placements."""

    facts: Facts
    placements: tuple[Placement, ...]

    def rows(self, thing: int = 0) -> list[int]:
        """Return the rows of the images that show a thing, each once."""
        return list(dict.fromkeys(p.row for p in self.placements if p.thing == thing))


def plain_scene(index: ImageIndex, row: int, background: str | None = None) -> Scene:
    """Return the scene of one whole image, with its style stated.

    Args:
        index: The index of the data set.
        row: Row of the image.
        background: A colour of the palette, or None for white that is not mentioned. Default: None.
    """
    facts = Facts(things=(_thing(index, row),), background=background)
    return Scene(facts=facts, placements=(Placement(thing=0, row=row, x=0.5, y=0.5, side=1.0),))


def side_by_side(index: ImageIndex, first: int, second: int, background: str | None = None) -> Scene:
    """Return the scene of two images of half the width, the first to the left of the second.

    Args:
        index: The index of the data set.
        first: Row of the image on the left.
        second: Row of the image on the right.
        background: A colour of the palette, or None for white that is not mentioned. Default: None.
    """
    things = (_thing(index, first), _thing(index, second))
    return Scene(
        facts=Facts(things=things, relation="left", background=background),
        placements=tuple(
            Placement(thing=i, row=row, x=0.25 + 0.5 * i, y=0.5, side=0.5)
            for i, row in enumerate((first, second))
        ),
    )


def _thing(index: ImageIndex, row: int) -> Thing:
    return Thing(name=index[row].name, style=index[row].style)


def draw_layout(
    facts: Facts,
    index: ImageIndex,
    rng: np.random.Generator,
    *,
    styles: Mapping[Style, float] | None = None,
) -> Scene:
    """Draw a layout for facts.

    Args:
        facts: What the prompt states.
        index: The index of the data set.
        rng: The only source of randomness.
        styles: Weights of the styles of things whose style is not stated, among those of the training images
            of their names; None for equal ones. Default: None.

    Raises:
        ValueError: If a thing has no image in its style, or no training image.
    """
    rows = [draw_row(thing, index, rng, styles=styles) for thing in facts.things]
    if len(rows) == 2:
        assert facts.relation is not None
        places = _pair(facts.relation, rng)
        owners = [0, 1]
    else:
        places = _counted(facts.count, rng) if facts.count > 1 else [_single(facts, rng)]
        owners = [0] * facts.count
    placements = tuple(
        Placement(thing=owner, row=rows[owner], x=x, y=y, side=side, tilt=tilt)
        for owner, (x, y, side, tilt) in zip(owners, places, strict=True)
    )
    return Scene(facts=facts, placements=placements)


def draw_row(
    thing: Thing, index: ImageIndex, rng: np.random.Generator, *, styles: Mapping[Style, float] | None = None
) -> int:
    """Draw the row of a thing's image: that of its style, or a training image; see `draw_layout`.

    Raises:
        ValueError: If there is none.
    """
    if thing.style is not None:
        return index.find(thing.name, thing.style)
    rows = [
        row
        for row in index.rows_of.get(thing.name, ())
        if not index[row].held_out and (thing.colour is None or index[row].tints)
    ]
    weights = np.array([1.0 if styles is None else styles.get(index[row].style, 0.0) for row in rows])
    if not weights.sum():
        raise ValueError(f"{thing}: no training image of this name in any style of positive weight")
    return int(rows[draw_index(rng, weights)])


def draw_index(rng: np.random.Generator, weights: np.ndarray) -> int:
    """Draw an index with probabilities in proportion to weights (n,), at least one of which is positive."""
    bounds = np.cumsum(weights)
    return int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))


_Place = tuple[float, float, float, float]  # x, y, side, tilt


def _single(facts: Facts, rng: np.random.Generator) -> _Place:
    """Place one thing: at full size or small, at its place or anywhere."""
    low, high = SMALL_SIDE if facts.small else FULL if facts.place is None else PLACED_SIDE
    tilt = rng.uniform(-TILT, TILT) if rng.random() < 0.5 else 0.0
    angle = math.radians(abs(tilt))
    extent = math.cos(angle) + math.sin(angle)  # of the tilted square
    side = rng.uniform(low, min(high, 1 / extent))
    half = side * extent / 2
    if facts.place is None:
        return rng.uniform(half, 1 - half), rng.uniform(half, 1 - half), side, tilt
    x, y = (
        min(max(centre + rng.uniform(-JITTER, JITTER), half), 1 - half)
        for centre in place_centre(facts.place, side)
    )
    return x, y, side, tilt


def place_centre(place: Place, side: float) -> Centre:
    """Return the centre (x, y) of a square of this side at a place, a thirty-second from the border."""
    near = MARGIN + side / 2
    x = near if place.endswith("left") else 1 - near if place.endswith("right") else 0.5
    y = near if place.startswith("top") else 1 - near if place.startswith("bottom") else 0.5
    return x, y


def _pair(relation: Relation, rng: np.random.Generator) -> list[_Place]:
    """Place two things that stand to each other as a relation says."""
    sides = _sides_that_fit(rng)
    arrange: Callable[[Sequence[float], np.random.Generator], list[Centre]]
    arrange = _column if relation in ("above", "below") else _row
    if relation == "and":
        arrange = (_row, _column, _diagonal)[rng.integers(3)]
    # the arrangements go from left to right and from top to bottom
    swapped = relation in ("right", "below") or (relation in ("and", "beside") and rng.random() < 0.5)
    order = [1, 0] if swapped else [0, 1]
    points = arrange([sides[i] for i in order], rng)
    return [(*points[order.index(i)], sides[i], 0.0) for i in (0, 1)]


def _sides_that_fit(rng: np.random.Generator) -> list[float]:
    """Draw two sides that fit side by side."""
    while True:
        sides = [rng.uniform(*SMALL_SIDE) for _ in range(2)]
        if sum(sides) <= 1:
            return sides


def _counted(count: int, rng: np.random.Generator) -> list[_Place]:
    """Place two to four images of one size."""
    side = rng.uniform(*COUNTED_SIDE)
    if count == 2:
        arrange = (_row, _column, _diagonal)[rng.integers(3)]
    elif count == 3:
        arrange = (_row, _column, _diagonal, _triangle)[rng.integers(4)]
        if arrange is not _triangle:
            side = rng.uniform(*LINE_OF_THREE)
    else:
        arrange = _square
    return [(*point, side, 0.0) for point in arrange([side] * count, rng)]


def _line(sides: Sequence[float], rng: np.random.Generator) -> list[float]:
    """Return centres along an axis of squares one after the other, with random gaps."""
    slack = 1 - sum(sides)
    cuts = np.sort(rng.uniform(0, slack, len(sides)))
    starts = np.concatenate([[0.0], np.cumsum(sides)[:-1]])
    return [float(start + cut + side / 2) for start, cut, side in zip(starts, cuts, sides, strict=True)]


def _across(sides: Sequence[float], rng: np.random.Generator) -> list[float]:
    """Return centres across a line: near a common one, inside the canvas."""
    half = max(sides) / 2
    common = rng.uniform(half, 1 - half)
    near = (common + rng.uniform(-LEVEL, LEVEL) for _ in sides)
    return [min(max(one, side / 2), 1 - side / 2) for one, side in zip(near, sides, strict=True)]


def _row(sides: Sequence[float], rng: np.random.Generator) -> list[Centre]:
    return list(zip(_line(sides, rng), _across(sides, rng), strict=True))


def _column(sides: Sequence[float], rng: np.random.Generator) -> list[Centre]:
    return [(x, y) for y, x in _row(sides, rng)]


def _diagonal(sides: Sequence[float], rng: np.random.Generator) -> list[Centre]:
    xs, ys = _line(sides, rng), _line(sides, rng)
    return list(zip(xs, ys if rng.random() < 0.5 else [1 - y for y in ys], strict=True))


def _triangle(sides: Sequence[float], rng: np.random.Generator) -> list[Centre]:
    """One above two, or two above one."""
    base, heights = _line(sides[:2], rng), _line(sides[:2], rng)
    single, double = heights if rng.random() < 0.5 else heights[::-1]
    return [(rng.uniform(base[0], base[1]), single), (base[0], double), (base[1], double)]


def _square(sides: Sequence[float], rng: np.random.Generator) -> list[Centre]:
    """Two by two, each somewhere in its quarter."""
    half = sides[0] / 2
    return [
        (rng.uniform(left + half, left + 0.5 - half), rng.uniform(top + half, top + 0.5 - half))
        for top in (0, 0.5)
        for left in (0, 0.5)
    ]
