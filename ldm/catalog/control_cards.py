"""Cards of controls: what a hint of each kind shows, and the convention of its values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ldm.support.config import nearest

ChannelOrder = Literal["rgb", "bgr"]


@dataclass(frozen=True, kw_only=True)
class ControlCard:
    """The convention of a control's hints.

    Args:
        name: Its name.
        shows: What a hint shows, in words.
        file: Regular expression that is found in the names of its files; "" for none.
        lines: Whether hints are bright lines on black.
        edges: Whether these lines are the edges of what the image shows. Default: False.
        normals: Whether hints are maps of normals, whose blue channel points to the viewer.
        masked: Whether a hint has a mask, below which it is −1, whereas it is in [0, 1] elsewhere.
        order: ChannelOrder of the channels that the network reads. Default: "rgb".
        global_pool: Whether residuals are averaged over positions, and the unconditional branch is not
            controlled. Default: False.
        union: Number of the hints' type in a ControlNet Union; None for a type that it has not. Default:
            None.
    """

    name: str
    shows: str
    file: str = ""
    lines: bool = False
    edges: bool = False
    normals: bool = False
    masked: bool = False
    order: ChannelOrder = "rgb"
    global_pool: bool = False
    union: int | None = None

    def __str__(self) -> str:
        values = "[0, 1], −1 below the mask" if self.masked else "[0, 1]"
        return f"{self.name}: hints are {self.shows}; values in {values}, {self.order.upper()}"


CONTROL_CARDS: Mapping[str, ControlCard] = {
    card.name: card
    for card in (  # the first whose expression is found in a file's name
        ControlCard(
            name="softedge",
            shows="soft edges, white on black",
            file=r"soft[-_ ]?edge|(?<![a-z])hed(?![a-z])|pidi(net)?(?![a-z])",
            lines=True,
            edges=True,
            union=2,
        ),
        ControlCard(
            name="scribble",
            shows="scribbles, white on black",
            file=r"scribble|sketch",
            lines=True,
            edges=True,
            union=2,
        ),
        ControlCard(
            name="lineart",
            shows="line art, white on black",
            file=r"line[-_ ]?art",
            lines=True,
            edges=True,
            union=3,
        ),
        ControlCard(
            name="canny",
            shows="edges of one pixel, white on black",
            file="canny",
            lines=True,
            edges=True,
            union=3,
        ),
        ControlCard(name="mlsd", shows="straight lines, white on black", file="mlsd", lines=True, union=3),
        ControlCard(
            name="openpose",
            shows="coloured skeletons on black, in RGB (OpenCV writes BGR)",
            file=r"open[-_ ]?pose|(?<![a-z])pose|key[-_ ]?pose",
            lines=True,
            union=0,
        ),
        ControlCard(name="depth", shows="depth, nearer is brighter", file=r"depth|midas|leres", union=1),
        ControlCard(
            name="normal",
            shows="normals, blue towards the viewer",
            file=r"normal",
            normals=True,
            union=4,
        ),
        ControlCard(name="seg", shows="segments in the colours of ADE20K", file=r"(?<![a-z])seg", union=5),
        ControlCard(
            name="shuffle",
            shows="an image whose parts were moved",
            file="shuffle",
            global_pool=True,
        ),
        ControlCard(name="tile", shows="the image to be refined", file=r"(?<![a-z])tile", union=6),
        ControlCard(
            name="inpaint", shows="the image to be filled in, with its mask", file="inpaint", masked=True
        ),
        ControlCard(name="ip2p", shows="the image that an instruction changes", file=r"ip2p|pix2pix"),
        ControlCard(name="image", shows="images of any kind"),
        ControlCard(name="reference", shows="images of any size, whose content and style are followed"),
    )
}


CARD_OF_HINTS: Mapping[str, str] = {
    "canny": "canny",
    "soft_edge": "softedge",
    "scribble": "scribble",
    "tile": "tile",
}
"""The cards of the hints that `ldm.images.hints` makes."""


def control_card(name: str | None, file: str, hints: str | None = None) -> ControlCard:
    """Return the card of a control.

    Args:
        name: Its name. None: that of the hints that it was trained with, else the first whose files have such
            names, else "image".
        file: Name of the file.
        hints: What made the hints of its training, as files of `part: control-net` state it. Default: None.

    Raises:
        ValueError: If there is no card of this name.
    """
    if name is None and hints is not None:
        name = CARD_OF_HINTS.get(hints)
    if name is None:
        cards = (card for card in CONTROL_CARDS.values() if card.file and re.search(card.file, file, re.I))
        return next(cards, CONTROL_CARDS["image"])
    if name not in CONTROL_CARDS:
        raise ValueError(f"card {name!r}; {nearest(name, CONTROL_CARDS)}")
    return CONTROL_CARDS[name]
