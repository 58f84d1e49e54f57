"""Random compositions: how often training sees each style, background, size and place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ldm.data.compose import PLACES, Composition, Place
from ldm.data.index import STYLES, ImageIndex, Style, held_out_pair
from ldm.data.palette import PALETTE

_BACKGROUNDS = tuple(PALETTE)
_OFF_CENTRE = tuple(place for place in PLACES if place != "centre")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The probabilities by which compositions are drawn.

    Args:
        noto: Weight of the style noto, at least 0, on any scale. Default: 2.
        fluent: Weight of the style fluent. Default: 1.
        twemoji: Weight of the style twemoji. Default: 1.
        background: Probability that the caption names a background, one of ten colours with equal chance.
            Default: 0.5.
        small: Probability of one image at half size. Default: 0.
        placed: Share of the small images that stand off the centre. Default: 0.75.
        two: Probability of two images of one style side by side; small + two is at most 1. Default: 0.
    """

    noto: float = 2.0
    fluent: float = 1.0
    twemoji: float = 1.0
    background: float = 0.5
    small: float = 0.0
    placed: float = 0.75
    two: float = 0.0

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        for style in STYLES:
            if not 0 <= values[style] < float("inf"):
                raise ValueError(f"{style} {values[style]}: expected a weight of at least 0")
        if self.noto + self.fluent + self.twemoji <= 0:
            raise ValueError("noto, fluent and twemoji are all 0: expected a positive weight of at least one")
        for name in ("background", "small", "placed", "two"):
            if not 0 <= values[name] <= 1:
                raise ValueError(f"{name} {values[name]}: expected a probability in [0, 1]")
        if self.small + self.two > 1:
            raise ValueError(f"small {self.small} + two {self.two}: expected a sum of at most 1")


def sample_composition(rng: np.random.Generator, index: ImageIndex, mix: Mix) -> Composition:
    """Draw a composition of training images; held-out images and (name, background) pairs never occur.

    Args:
        rng: The only source of randomness.
        index: The index of the data set.
        mix: The probabilities.

    Raises:
        ValueError: If no style with a positive weight has a training image.
    """
    rows = index.train_of[_draw_style(rng, index, mix)]
    image = int(rows[rng.integers(len(rows))])
    kind = rng.random()
    second = int(rows[rng.integers(len(rows))]) if kind < mix.two else None
    small = mix.two <= kind < mix.two + mix.small
    place: Place = "centre"
    if small and rng.random() < mix.placed:
        place = _OFF_CENTRE[rng.integers(len(_OFF_CENTRE))]
    background = None
    if rng.random() < mix.background:
        names = [index[i].name for i in (image, second) if i is not None]
        # never empty: white is allowed for every name
        allowed = [
            colour for colour in _BACKGROUNDS if not any(held_out_pair(name, colour) for name in names)
        ]
        background = allowed[rng.integers(len(allowed))]
    return Composition(
        image=image, second=second, background=background, size="small" if small else "full", place=place
    )


def _draw_style(rng: np.random.Generator, index: ImageIndex, mix: Mix) -> Style:
    weights = [getattr(mix, style) if len(index.train_of[style]) else 0.0 for style in STYLES]
    if sum(weights) <= 0:
        raise ValueError(f"no training image in any style of positive weight: {mix}")
    draw = rng.random() * sum(weights)
    for style, weight in zip(STYLES, weights, strict=True):
        draw -= weight
        if draw < 0:
            return style
    # rounding can leave the draw at the sum
    return next(style for style, weight in zip(STYLES, weights, strict=True) if weight > 0)
