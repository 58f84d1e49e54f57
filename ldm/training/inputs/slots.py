"""Scenes as a model with exemplars sees them: captions with slot words, and layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm.conditioning.layouts import INSTANCES
from ldm.conditioning.things import SLOT_WORDS
from ldm.conditioning.words import words_in
from ldm.data import Scene
from ldm.data.captions import CaptionPieces
from ldm.data.facts import STYLES
from ldm.data.rendering import THING_AREAS
from ldm.models.layout import ThingLayout


def slot_text(pieces: CaptionPieces) -> tuple[str, list[int]]:
    """Return a caption with slot words in place of nouns and without styles, and the things by slot.

    Slots are in the order in which the caption names the things.
    """
    words: list[str] = []
    order: list[int] = []
    for piece in pieces:
        if piece.noun and piece.area in THING_AREAS:
            words.append(SLOT_WORDS[len(order)])
            order.append(THING_AREAS.index(piece.area))
        else:
            words += words_in(" ".join(word for word in piece.text.split() if word not in STYLES))
    return " ".join(words), order


def scene_layouts(scenes: Sequence[Scene | None], orders: Sequence[Sequence[int]]) -> ThingLayout:
    """Return the layouts of scenes.

    Args:
        scenes: B scenes; None for one without things.
        orders: For each scene the thing of each slot.
    """
    places = torch.zeros(len(scenes), INSTANCES, 4, dtype=torch.float32, device="cpu")
    owner = torch.full((len(scenes), INSTANCES), -1, dtype=torch.int64, device="cpu")
    for i, (scene, order) in enumerate(zip(scenes, orders, strict=True)):
        placements = () if scene is None else scene.placements
        # of two things in the order of their slots, of several instances in that of the scene
        for j, p in enumerate(sorted(placements, key=lambda p: order.index(p.thing))):
            places[i, j] = torch.tensor([p.x, p.y, p.side, p.tilt], dtype=torch.float32, device="cpu")
            owner[i, j] = order.index(p.thing)
    return ThingLayout(places=places, owner=owner)
