"""Facts: what a prompt states about an image. What it does not state varies; see `ldm.data.layout`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ldm.data.palette import PALETTE, THING_COLOURS
from ldm.support.config import nearest

Style = Literal["noto", "fluent", "twemoji", "flat", "noto-v1", "emojione", "fxemoji"]
Place = Literal[
    "centre", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right"
]
Relation = Literal["and", "beside", "left", "right", "above", "below"]
STYLES: tuple[Style, ...] = get_args(Style)
PLACES: tuple[Place, ...] = get_args(Place)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
MOST = 4  # the largest count


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A thing that a prompt names.

    Args:
        name: Its name in the index, such as "red-apple".
        style: The style of its image; None for any. Default: None.
        colour: The colour that its image is recoloured in; None for its own. Default: None.

    Raises:
        ValueError: For a style or a colour that is not among the choices.
    """

    name: str
    style: Style | None = None
    colour: str | None = None

    def __post_init__(self) -> None:
        _check("style", self.style, STYLES)
        _check("colour", self.colour, THING_COLOURS)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a prompt states.

    Args:
        things: One thing, or two with different names.
        count: How often a single thing is shown, 1 to 4. Default: 1.
        relation: How the first of two things stands to the second: "and" for anyhow, "left" for "to the left
            of". It is None for a single thing, and only then. Default: None.
        small: Whether a single thing is called small. Default: False.
        place: Where a single thing stands; None for anywhere. Default: None.
        background: A colour of the palette; None for white that is not mentioned. Default: None.

    Raises:
        ValueError: For a value that is not among the choices, or facts that exclude each other.
    """

    things: tuple[Thing, ...]
    count: int = 1
    relation: Relation | None = None
    small: bool = False
    place: Place | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        _check("relation", self.relation, RELATIONS)
        _check("place", self.place, PLACES)
        _check("background", self.background, PALETTE)
        names = [thing.name for thing in self.things]
        if len(names) not in (1, 2) or len(set(names)) < len(names):
            raise ValueError(f"things: expected one, or two with different names, got {names}")
        if not 1 <= self.count <= MOST:
            raise ValueError(f"count {self.count}: expected 1 to {MOST}")
        if (self.relation is None) == (len(names) == 2):
            raise ValueError(f"relation {self.relation!r}: expected one of {RELATIONS} for two things only")
        if (self.small or self.place is not None) and (len(names) == 2 or self.count > 1):
            raise ValueError(
                f"small {self.small}, place {self.place!r}: expected False and None for several things"
            )
        if len(names) == 2 and self.count > 1:
            raise ValueError(f"count {self.count}: expected 1 for two things")

    @property
    def is_plain(self) -> bool:
        """Whether the facts are about one thing in its own colour at full size."""
        return (
            len(self.things) == self.count == 1
            and not self.small
            and self.place is None
            and self.things[0].colour is None
        )


def _check(field: str, value: str | None, choices: tuple[str, ...] | dict[str, tuple[int, int, int]]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{field} {value!r}; {nearest(value, choices)}")
