"""Random facts: how often training sees each style, relation, count, colour, size, place and background."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm.data.facts import MOST, PLACES, RELATIONS, STYLES, Facts, Relation, Style, Thing
from ldm.data.held_out import are_held_out
from ldm.data.index import ImageIndex
from ldm.data.layout import Scene, draw_index, draw_layout
from ldm.data.nouns import names_colour, plural, uncoloured
from ldm.data.palette import PALETTE, THING_COLOURS
from ldm.data.wording import COUNTS, SMALL

ATTEMPTS = 10_000  # drawings of facts until none of their combinations is held out or ambiguous


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The probabilities by which facts are drawn.

    Args:
        styles: Weight of each style's images, at least 0, on any scale; a style that is absent has 0.
            Default: 1 for every style.
        style: Probability that a thing's style is stated. Default: 0.4.
        two: Probability of two things. Default: 0.35.
        related: Share of the two things whose relation is more than "and". Default: 0.65.
        count: Probability of one thing two to four times; two + count is at most 1. Default: 0.15.
        small: Share of the other scenes, of one thing once, whose thing is small. Default: 0.15.
        placed: Share of these scenes, independently of `small`, whose thing has a place. Default: 0.15.
        colour: Probability that a thing's colour is stated. Default: 0.3.
        background: Probability that a background is stated, one of ten colours with equal chance.
            Default: 0.5.
    """

    styles: Mapping[Style, float] = field(default_factory=lambda: dict.fromkeys(STYLES, 1.0))
    style: float = 0.4
    two: float = 0.35
    related: float = 0.65
    count: float = 0.15
    small: float = 0.15
    placed: float = 0.15
    colour: float = 0.3
    background: float = 0.5

    def __post_init__(self) -> None:
        if not all(style in STYLES and 0 <= weight < math.inf for style, weight in self.styles.items()):
            raise ValueError(f"styles {self.styles}: expected weights of at least 0 for some of {STYLES}")
        if not sum(self.styles.values()) > 0:
            raise ValueError(f"styles {self.styles}: expected a positive weight of at least one")
        for name, value in dataclasses.asdict(self).items():
            if name != "styles" and not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: expected a probability in [0, 1]")
        if self.two + self.count > 1:
            raise ValueError(f"two {self.two} + count {self.count}: expected a sum of at most 1")

    @property
    def is_plain(self) -> bool:
        """Whether every scene shows one thing in its own colour at full size."""
        return not any((self.two, self.count, self.small, self.placed, self.colour))


def check_mix(mix: Mix, index: ImageIndex) -> None:
    """Check that training images of an index allow every kind of scene that a mix has.

    Raises:
        ValueError: If no style of positive weight has a training image, or a probability is more than 0 for
            facts that no scene can have: two things where there is one name, or a colour where nothing can be
            recoloured. The message names the probability.
    """
    kinds: dict[str, tuple[dict[str, Any], Callable[[Facts], object]]] = {
        "two": ({"two": 1.0, "count": 0.0}, lambda facts: facts.relation),
        "count": ({"two": 0.0, "count": 1.0}, lambda facts: facts.count > 1),
        "colour": ({"colour": 1.0}, lambda facts: any(thing.colour for thing in facts.things)),
        "background": ({"background": 1.0}, lambda facts: facts.background),
    }
    rng = np.random.default_rng(0)
    sample_facts(rng, index, mix)
    for name, (changes, has) in kinds.items():
        if getattr(mix, name) > 0:
            changed = dataclasses.replace(mix, **changes)
            try:
                possible = any(has(sample_facts(rng, index, changed)) for _ in range(1000))
            except ValueError:
                possible = False
            if not possible:
                raise ValueError(
                    f"{name} {getattr(mix, name)}: expected 0, as the {len(index.train)} training images, or"
                    " what is held out of their combinations, allow no such scene"
                )


def sample_scene(rng: np.random.Generator, index: ImageIndex, mix: Mix) -> Scene:
    """Draw a scene of training images; nothing held out ever occurs.

    Args:
        rng: The only source of randomness.
        index: The index of the data set.
        mix: The probabilities.

    Raises:
        ValueError: If the mix allows nothing: no style of positive weight has a training image, or all
            combinations are held out.
    """
    return draw_layout(sample_facts(rng, index, mix), index, rng, styles=mix.styles)


def sample_facts(rng: np.random.Generator, index: ImageIndex, mix: Mix) -> Facts:
    """Draw facts about training images, none of which is held out or ambiguous; see `sample_scene`."""
    weights = np.array([mix.styles.get(style, 0.0) * (len(index.train_of[style]) > 0) for style in STYLES])
    if not weights.sum():
        raise ValueError(f"no training image in any style of positive weight: {dict(mix.styles)}")
    for _ in range(ATTEMPTS):
        facts = _draw_facts(rng, index, mix, weights)
        if facts is not None and not are_held_out(facts):
            return facts
    raise ValueError(
        f"no facts in {ATTEMPTS} attempts: all that {mix} gives of {len(index)} images are held out"
    )


def _draw_facts(rng: np.random.Generator, index: ImageIndex, mix: Mix, weights: np.ndarray) -> Facts | None:
    """Draw facts, or None if they contradict each other or cannot be stated."""
    kind = rng.random()
    two, count = kind < mix.two, 1
    if mix.two <= kind < mix.two + mix.count:
        count = int(rng.integers(2, MOST + 1))
    single = not two and count == 1
    relation: Relation | None = None
    if two:
        relation = RELATIONS[rng.integers(1, len(RELATIONS))] if rng.random() < mix.related else "and"
    background = tuple(PALETTE)[rng.integers(len(PALETTE))] if rng.random() < mix.background else None
    things = tuple(_draw_thing(rng, index, mix, weights) for _ in range(2 if two else 1))
    if len({thing.name for thing in things}) < len(things):
        return None
    facts = Facts(
        things=things,
        count=count,
        relation=relation,
        small=single and rng.random() < mix.small,
        place=PLACES[rng.integers(len(PLACES))] if single and rng.random() < mix.placed else None,
        background=background,
    )
    return facts if can_be_stated(facts, index) else None


def _draw_thing(rng: np.random.Generator, index: ImageIndex, mix: Mix, weights: np.ndarray) -> Thing:
    """Draw a thing: every image of a style is equally likely, whether the style is stated or not."""
    rows = index.train_of[STYLES[draw_index(rng, weights)]]
    row = index[int(rows[rng.integers(len(rows))])]
    style = row.style if rng.random() < mix.style else None
    colour = None
    if rng.random() < mix.colour and row.tints:
        colour = THING_COLOURS[rng.integers(len(THING_COLOURS))]
    return Thing(name=row.name, style=style, colour=colour)


def can_be_stated(facts: Facts, index: ImageIndex) -> bool:
    """Return whether a caption can state facts so that only they are meant, and an image can show them.

    A noun must have a plural to be counted, and that must not be another name ("houses"). A thing in the
    background's colour cannot be seen. A word before a noun must not make another name ("small" before
    "airplane", "blue" before "heart"), and a name that holds a colour's name does not take another colour
    ("large blue diamond").
    """
    for thing in facts.things:
        noun = thing.name.replace("-", " ")
        if thing.colour is not None:
            if names_colour(noun) or thing.colour == facts.background:
                return False
            noun = uncoloured(noun)
        many = noun if facts.count == 1 else plural(noun)
        if many is None or index.names_other(many, thing.name):
            return False
        words = [*COUNTS.get(facts.count, ()), *(SMALL if facts.small else ())]
        words += [word for word in (thing.colour, thing.style) if word is not None]
        if any(index.reads_otherwise(word, many) for word in words):
            return False
    return True
