"""What is held out of every training, by a hash of names alone."""

from __future__ import annotations

import hashlib

from ldm.data.facts import MOST, Facts
from ldm.data.palette import PALETTE, THING_COLOURS
from ldm.support.config import nearest

HELD_OUT_IMAGES = 0.05  # the share of (name, style) images
HELD_OUT_FACTS = 0.1  # the share of (name, colour), (name, count) and (name, background) combinations each
HELD_OUT_PAIRS = 0.2  # the share of pairs of names


def _fraction(*key: str) -> float:
    """Return a number in [0, 1) that is a hash of the strings alone."""
    digest = hashlib.sha256("\n".join(("ldm emoji held-out 1", *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out_image(name: str, style: str) -> bool:
    """Return whether the image of this name in this style is held out: 5 % of all."""
    return _fraction("picture", name, style) < HELD_OUT_IMAGES


def held_out_background(name: str, background: str | None) -> bool:
    """Return whether this name (in any style) is held out on this background: 10 % of all.

    White never is, whether the caption names it or not (None), because every source image is seen on white.

    Raises:
        ValueError: If the background is not in the palette.
    """
    if background is not None and background not in PALETTE:
        raise ValueError(f"background {background!r}: not in the palette; {nearest(background, PALETTE)}")
    return background not in (None, "white") and _fraction("pair", name, background) < HELD_OUT_FACTS


def held_out_colour(name: str, colour: str | None) -> bool:
    """Return whether this name is held out in this colour: 10 % of all; never in its own colour (None).

    Raises:
        ValueError: If the colour is none of the things' colours.
    """
    if colour is not None and colour not in THING_COLOURS:
        raise ValueError(f"colour {colour!r}; {nearest(colour, THING_COLOURS)}")
    return colour is not None and _fraction("colour", name, colour) < HELD_OUT_FACTS


def held_out_count(name: str, count: int) -> bool:
    """Return whether this name is held out in this number: 10 % of all from two to four.

    Raises:
        ValueError: If the count is not 1 to 4.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count {count}: expected 1 to {MOST}")
    return count > 1 and _fraction("count", name, str(count)) < HELD_OUT_FACTS


def held_out_pair(name: str, other: str) -> bool:
    """Return whether these two names are held out together, in either order: 20 % of all pairs."""
    return name != other and _fraction("names", *sorted((name, other))) < HELD_OUT_PAIRS


def are_held_out(facts: Facts) -> bool:
    """Return whether any combination of facts that a prompt states is held out; images are not considered."""
    names = [thing.name for thing in facts.things]
    return (
        any(held_out_background(name, facts.background) for name in names)
        or any(held_out_colour(thing.name, thing.colour) for thing in facts.things)
        or held_out_count(names[0], facts.count)
        or held_out_pair(names[0], names[-1])
    )
