"""Scenes as a model with exemplars sees them: captions with slot words, and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.layouts import INSTANCES
from ldm.conditioning.things import SLOT_WORDS
from ldm.conditioning.words import words_in
from ldm.data import ImageIndex, Scene
from ldm.data.captions import CaptionPieces, caption_pieces
from ldm.data.facts import STYLES
from ldm.data.rendering import THING_AREAS, Area
from ldm.diffusion.cond import Cond
from ldm.models.layout import ThingLayout, multiplied, place_exemplars
from ldm.models.text.bpe import Tokenizer
from ldm.training.inputs.emoji import EmojiImages
from ldm.training.losses.grounding import LEAST_COVERAGE, NamedArea


@dataclass(frozen=True, kw_only=True)
class SlotCaption:
    """A caption with slot words in place of nouns and without styles.

    Attributes:
        words: The words.
        areas: What each word describes, or None.
        order: The thing of each slot. Slots are in the order in which the caption names the things.
    """

    words: tuple[str, ...] = ()
    areas: tuple[Area | None, ...] = ()
    order: tuple[int, ...] = ()

    @classmethod
    def of(cls, pieces: CaptionPieces) -> SlotCaption:
        """Return the caption of its pieces."""
        words: list[str] = []
        areas: list[Area | None] = []
        order: list[int] = []
        for piece in pieces:
            if piece.noun and piece.area in THING_AREAS:
                own = [SLOT_WORDS[len(order)]]
                order.append(THING_AREAS.index(piece.area))
            else:
                own = words_in(" ".join(word for word in piece.text.split() if word not in STYLES))
            words += own
            areas += [piece.area] * len(own)
        return cls(words=tuple(words), areas=tuple(areas), order=tuple(order))

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return its tokens, without start and end."""
        return tokenizer.encode(" ".join(self.words))

    def tokens(self, tokenizer: Tokenizer) -> dict[Area, list[int]]:
        """Return the positions, in the context, of the tokens that describe each area."""
        found: dict[Area, list[int]] = {}
        position = 1  # behind the start token
        for word, area in zip(self.words, self.areas, strict=True):
            end = position + len(tokenizer.encode(word))
            if area is not None:
                found.setdefault(area, []).extend(range(position, end))
            position = end
        return found


def named_on_canvas(captions: Sequence[SlotCaption], canvas: Tensor, tokenizer: Tokenizer) -> list[NamedArea]:
    """Return what captions name, with the areas that the things have on a canvas.

    Args:
        captions: B captions.
        canvas: See `ldm.models.layout.place_exemplars`, (B, K, 4, H, W).
        tokenizer: The tokenizer of the text tower.
    """
    found = []
    for sample, caption in enumerate(captions):
        opacity = canvas[sample, :, 3]  # (K, H, W)
        areas = {THING_AREAS[thing]: opacity[slot] for slot, thing in enumerate(caption.order)}
        areas["background"] = (1 - opacity.sum(0)).clamp_min(0)
        for area, tokens in caption.tokens(tokenizer).items():
            if areas[area].mean() >= LEAST_COVERAGE:
                found.append(NamedArea(sample=sample, tokens=tokens, area=areas[area]))
    return found


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


def slot_captions(
    scenes: Sequence[Scene | None], index: ImageIndex, rngs: Sequence[np.random.Generator] | None
) -> list[SlotCaption]:
    """Return the captions of scenes.

    Args:
        scenes: B scenes; None for an empty caption.
        index: The index of the data set.
        rngs: Draw the wordings, one for each scene; None for the canonical ones.
    """
    drawn = [None] * len(scenes) if rngs is None else rngs
    return [
        SlotCaption() if scene is None else SlotCaption.of(caption_pieces(scene.facts, index, rng))
        for scene, rng in zip(scenes, drawn, strict=True)
    ]


def scene_condition(
    scenes: Sequence[Scene | None],
    captions: Sequence[SlotCaption],
    layout: ThingLayout,
    *,
    images: EmojiImages,
    text: TextConditioner,
    slots: int,
) -> Cond:
    """Return the condition of scenes: the states of their captions, and the images of their things in place.

    Args:
        scenes: B scenes; None for no condition.
        captions: Their captions.
        layout: Where their things lie; see `scene_layouts`.
        images: The data set.
        text: The text tower.
        slots: Number K of things on a canvas.

    Returns:
        A Cond with context (B, M, D), its mask, and exemplars (B, K, 4, H, W), where the tower is.
    """
    data, side = images.data, images.size
    shown = np.zeros((len(scenes), slots, *data.images.shape[1:]), dtype=np.uint8)
    for row, scene, caption in zip(shown, scenes, captions, strict=True):
        for slot, thing in enumerate(caption.order):
            assert scene is not None
            row[slot] = data.images[scene.rows(thing)[0]]
    sources = torch.from_numpy(shown).movedim(-1, 2).float() / 255  # (B, K, 4, S, S)
    canvas = place_exemplars(multiplied(sources), layout, (side, side))  # (B, K, 4, H, W)
    states = text.encode([caption.ids(text.tokenizer) for caption in captions])
    assert states.mask is not None
    return Cond(context=states.tokens, context_mask=states.mask, exemplars=canvas.to(states.tokens.device))
