"""The judge of scenes: whether an image shows what facts state, by rule on pixels and without any network.

Each thing that is asked for is searched by correlation with the images of its name, and its place, size and
tilt are found by least squares. There it is compared with all images of the data set, each at its own best
place, size and tilt, drawn by the renderer of the data; it must be nearer to its name than to any other. Its
colour must be nearer to the one asked for than to the others. What no thing explains is a fault too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scene_fit import Part, SceneFit, seen_background, smooth
from scene_gallery import SceneGallery
from torch import Tensor

from ldm.data import EmojiData, Facts
from ldm.data.layout import place_centre

MOST_ERROR = 0.45  # the share of the energy of a thing that its image may leave unexplained
SAME_PLACE, SMALL = 0.12, 0.65  # of the canvas: distance from a stated place; largest side of a small thing
PART_CONTRAST = 0.18  # of a further part from the background
BORDER = 1 / 40  # of the canvas: so far from a thing's square a difference belongs to the thing
MOST_EXTRA = 0.25  # area of further parts, of the smallest thing's


@dataclass(frozen=True, kw_only=True)
class SceneVerdict:
    """The judgement of one image.

    Attributes:
        faults: What is wrong, "kind: details"; empty if everything is right. The kinds are background,
            absent, name, colour, relation, size, place and extra.
        background: The background colour seen.
        parts: The things that were searched.
    """

    faults: tuple[str, ...]
    background: str
    parts: tuple[Part, ...]

    @property
    def is_right(self) -> bool:
        """Whether the image shows everything that the facts state."""
        return not self.faults


class SceneJudge:
    """Judge images of scenes against all images of a data set, including held-out ones."""

    def __init__(self, data: EmojiData) -> None:
        self.index, self.gallery = data.index, SceneGallery(data)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, facts: Facts) -> SceneVerdict:
        """Return the verdict on an image.

        Args:
            image: (S, S, 3) uint8 sRGB; S is a multiple of 8, at least 64.
            facts: What the image should show.

        Raises:
            ValueError: If the shape is another one, or the data set lacks a name, or a name's style.
        """
        if image.dtype != np.uint8 or image.shape != (len(image), len(image), 3):
            raise ValueError(f"expected uint8 (S, S, 3), got {image.dtype} {image.shape}")
        if len(image) < 64 or len(image) % 8:
            raise ValueError(f"side {len(image)}: expected a multiple of 8, at least 64")
        values = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        background, level = seen_background(values)
        asked = facts.background or "white"
        faults = [] if background == asked else [f"background: {background} instead of {asked}"]
        fit = SceneFit(self.gallery, smooth(values - level.view(3, 1, 1)), background, facts)
        wrong = [fault for part in fit.parts for fault in self._part_faults(part, facts)]
        wanted = max(facts.count, len(facts.things))
        if len(fit.parts) < wanted:
            wrong.append(f"absent: {len(fit.parts)} of {wanted} places found")
        faults += wrong or _arrangement_faults(fit.parts, facts)
        extra = extra_area(fit)
        if not wrong and extra > MOST_EXTRA:
            faults.append(f"extra: {extra:.2f} of the smallest thing's area")
        return SceneVerdict(faults=tuple(faults), background=background, parts=fit.parts)

    def _part_faults(self, part: Part, facts: Facts) -> list[str]:
        thing = facts.things[part.placement.thing]
        if part.error > MOST_ERROR:
            return [f"absent: {thing.name}; {part.error:.2f} of the energy of the best match is unexplained"]
        if thing.colour is not None and part.colour != thing.colour:
            return [f"colour: {thing.name} in {part.colour or 'its own'} instead of {thing.colour}"]
        if not part.is_named:
            nearest = self.index[part.nearest]
            return [f"name: {nearest.name} ({nearest.style}) is nearer than {thing.name}"]
        return []


def _arrangement_faults(parts: Sequence[Part], facts: Facts) -> list[str]:
    """Return what is wrong in how things that were found stand."""
    first = parts[0].placement
    if facts.relation is not None:
        other = parts[1].placement
        seen = relation_of(other.x - first.x, other.y - first.y)
        allowed = {"and": {seen}, "beside": {"left", "right"}}.get(facts.relation, {facts.relation})
        return [] if seen in allowed else [f"relation: {seen} instead of {facts.relation}"]
    faults = []
    if facts.small and first.side > SMALL:
        faults.append(f"size: {first.side:.2f} of the canvas, not small")
    if facts.place is not None:
        x, y = place_centre(facts.place, first.side)
        if math.hypot(first.x - x, first.y - y) > SAME_PLACE:
            faults.append(f"place: ({first.x:.2f}, {first.y:.2f}) is not {facts.place}")
    return faults


def relation_of(dx: float, dy: float) -> str:
    """Return how a thing stands to another that lies (dx, dy) from it: by the larger distance."""
    if abs(dx) >= abs(dy):
        return "left" if dx > 0 else "right"
    return "above" if dy > 0 else "below"


def extra_area(fit: SceneFit) -> float:
    """Return the area that differs from the background outside all things, per area of the smallest thing."""
    size = fit.image.shape[-1]
    drawn = _area(fit.drawn)
    ticks = (torch.arange(size) + 0.5) / size
    free, areas = torch.ones(size, size, dtype=torch.bool), []
    for part in fit.parts:
        at = part.placement
        half = at.side / 2 + BORDER
        inside = ((ticks - at.y).abs() <= half)[:, None] & ((ticks - at.x).abs() <= half)
        areas.append(float((drawn & inside).sum()))
        free &= ~inside
    return float((_area(fit.image) & free).sum()) / max(min(areas, default=0.0), 1.0)


def _area(image: Tensor) -> Tensor:
    """Return where an image (3, S, S) of differences from the background is not background, (S, S)."""
    return F.avg_pool2d(image, 3, 1, 1).abs().amax(0) > PART_CONTRAST
