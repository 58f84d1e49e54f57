"""Drawing compositions: how often training sees which style, ground, size and place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ldm.data.compose import PLACES, Composition, Place
from ldm.data.index import STYLES, PictureIndex, held_out_pair
from ldm.data.palette import PALETTE

_GROUNDS = tuple(PALETTE)
_OFF_CENTRE = tuple(place for place in PLACES if place != "centre")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The shares of what is drawn: weights of the styles (any scale) and probabilities of each change.

    ``ground``: a colour said, of ten with equal chance. ``small``: one picture at half size, off the centre
    in a share ``placed`` of these. ``two``: two pictures of one style side by side. ``small`` and ``two``
    exclude each other.
    """

    noto: float = 2.0
    fluent: float = 1.0
    twemoji: float = 1.0
    ground: float = 0.5
    small: float = 0.0
    placed: float = 0.75
    two: float = 0.0

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        for name in STYLES:
            if not 0 <= values[name] < float("inf"):
                raise ValueError(f"{name} {values[name]}: expected a weight of at least 0")
        if self.noto + self.fluent + self.twemoji <= 0:
            raise ValueError("noto, fluent and twemoji are all 0: nothing could be drawn")
        for name in ("ground", "small", "placed", "two"):
            if not 0 <= values[name] <= 1:
                raise ValueError(f"{name} {values[name]}: expected a probability in [0, 1]")
        if self.small + self.two > 1:
            raise ValueError(f"small {self.small} + two {self.two}: expected at most 1 together")


def sample_composition(rng: np.random.Generator, index: PictureIndex, mix: Mix) -> Composition:
    """A composition of training pictures, drawn with ``rng`` alone; never a held-out picture or (name,
    ground) pair."""
    rows = index.train_of[_style(rng, index, mix)]
    picture = int(rows[rng.integers(len(rows))])
    kind = rng.random()
    second = int(rows[rng.integers(len(rows))]) if kind < mix.two else None
    small = mix.two <= kind < mix.two + mix.small
    place: Place = "centre"
    if small and rng.random() < mix.placed:
        place = _OFF_CENTRE[rng.integers(len(_OFF_CENTRE))]
    ground = None
    if rng.random() < mix.ground:
        names = [index[i].name for i in (picture, second) if i is not None]
        # white always is
        allowed = [colour for colour in _GROUNDS if not any(held_out_pair(name, colour) for name in names)]
        ground = allowed[rng.integers(len(allowed))]
    return Composition(
        picture=picture, second=second, ground=ground, size="small" if small else "full", place=place
    )


def _style(rng: np.random.Generator, index: PictureIndex, mix: Mix) -> str:
    weights = [getattr(mix, style) if len(index.train_of[style]) else 0.0 for style in STYLES]
    if sum(weights) <= 0:
        raise ValueError(f"no training picture in any style that the mix gives a weight: {mix}")
    draw = rng.random() * sum(weights)
    for style, weight in zip(STYLES, weights, strict=True):
        draw -= weight
        if draw < 0:
            return style
    # a rounding error away from the sum
    return next(style for style, weight in zip(STYLES, weights, strict=True) if weight > 0)
