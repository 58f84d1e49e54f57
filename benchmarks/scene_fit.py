"""The things of a scene in an image: where each one asked for fits best, and which image is nearest there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scene_gallery import COARSE, SceneGallery, rgb
from scene_search import GRID, around, correlate, peaks, pyramid, refine, sample
from torch import Tensor

from ldm.data import PALETTE, THING_COLOURS, Facts, Placement, Scene, Thing, render

TIE, LEAST_TIE = 1.02, 0.001  # errors are equal up to this factor and this share of the energy
MOST_OVERLAP = 0.3  # of the smaller of two squares
SIDES = {  # that are tried, by the number of parts
    1: (0.38, 0.43, 0.49, 0.56, 0.64, 0.73, 0.82, 0.9, 0.98),
    2: (0.34, 0.39, 0.44, 0.5, 0.57),
    3: (0.28, 0.32, 0.37, 0.43, 0.49),
    4: (0.33, 0.38, 0.44, 0.5),
}
TILTS = (-0.1, 0.0, 0.1)  # of a single thing, in radians
SHIFTS, SCALES = (-0.09, 0.0, 0.09), (0.82, 0.9, 1.0, 1.1, 1.22)  # of other images, to begin with
CANDIDATES, FINALISTS, OWN = 96, 6, 2  # images that are fitted; those of other and own names that are drawn
HOPELESS = 0.75  # the share of the energy that a thing at its first pose may leave unexplained
CLOSE = 0.05  # images are drawn if their gain is below the largest one by this share of the energy at most
REACH = 1.15  # side of the square in which images are compared, per side of the thing
Found = tuple[int, int, Tensor]  # a thing of the facts, a row, a pose (4,)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that was found in an image.

    Attributes:
        placement: The nearest image of the name that was asked for, and where it lies.
        error: The share of the energy there that this image, in its nearest colour, leaves unexplained; 0 is
            a perfect match.
        nearest: Row of the nearest image of all.
        rank: How many images of other names (or styles, if one was asked for) are nearer: 0 to `FINALISTS`.
        colour: The nearest colour of things, or None for the thing's own; None if no colour was asked for.
    """

    placement: Placement
    error: float
    nearest: int
    rank: int
    colour: str | None

    @property
    def is_named(self) -> bool:
        """Whether no image of another name is nearer."""
        return self.rank == 0


class SceneFit:
    """The fit of facts to an image, which is given as differences from its background, (3, S, S).

    A thing that leaves more than `hopeless` of its energy unexplained at its first pose is not compared with
    other images. Default: 0.75.
    """

    def __init__(
        self,
        gallery: SceneGallery,
        image: Tensor,
        background: str,
        facts: Facts,
        *,
        hopeless: float = HOPELESS,
    ) -> None:
        self.hopeless = hopeless
        self.gallery, self.image, self.background, self.facts = gallery, image, background, facts
        self.own = [_rows(gallery, thing) for thing in facts.things]
        self.drawn = torch.zeros_like(image)
        self.parts: tuple[Part, ...] = ()
        self._fit()

    def _fit(self) -> None:
        located = [self._locate(i) for i in range(len(self.own))]
        poses = _apart(*located) if len(located) == 2 else _separate(*located[0], self.facts.count)
        levels = pyramid(self.image)
        placed = [self._settle(i, levels, pose) for i, pose in poses]
        drawn = [self._draw(i, row, pose) for i, row, pose in placed]
        total = sum(drawn, torch.zeros_like(self.image))
        parts = []
        for (i, row, pose), mine in zip(placed, drawn, strict=True):
            part = self._identify(i, row, pose, self.image - total + mine)
            parts.append(part)
        self.drawn, self.parts = total, tuple(parts)

    def _locate(self, i: int) -> tuple[Tensor, Tensor]:
        """Return poses (m, 4) where a thing's images fit best, and their gains (m,)."""
        count = max(len(self.facts.things), self.facts.count)
        small = self.gallery.small(self.own[i], self.facts.things[i].colour, self.background)
        coarse = F.interpolate(self.image[None], size=(GRID, GRID), mode="area")[0]
        found = correlate(coarse, small, SIDES[count], TILTS if count == 1 else (0.0,))
        poses, which = peaks(*found, 3 if count == 1 else 10)
        return refine(pyramid(self.image), small[which], poses, 4)

    def _settle(self, i: int, levels: list[Tensor], pose: Tensor) -> Found:
        """Return the best row of a thing at a pose, and the improved pose."""
        colour, rows = self.facts.things[i].colour, self.own[i]
        starts = pose.expand(len(rows), -1)
        poses, gains = refine(levels, self.gallery.small(rows, colour, self.background), starts, 4)
        best = int(gains.argmax())
        return i, rows[best], poses[best]

    def _identify(self, i: int, row: int, pose: Tensor, image: Tensor) -> Part:
        """Compare the image of a thing with all images of the data set, each at its own best pose."""
        seen = image * self._square(pose)
        nearest, rank = row, FINALISTS
        if _energy(seen - self._draw(i, row, pose)) <= self.hopeless * _energy(seen):
            row, pose, nearest, rank = self._compare(i, pose, seen)
        colour, error = self._colour(i, row, pose, seen)
        x, y, side, tilt = pose.tolist()
        return Part(
            placement=Placement(thing=i, row=row, x=x, y=y, side=side, tilt=math.degrees(tilt)),
            error=error / max(_energy(seen), 1e-12),
            nearest=nearest,
            rank=rank,
            colour=colour,
        )

    def _compare(self, i: int, pose: Tensor, seen: Tensor) -> tuple[int, Tensor, int, int]:
        """Return a thing's nearest row, its pose, the nearest row of all, and the thing's rank."""
        thing, own, levels = self.facts.things[i], self.own[i], pyramid(seen)
        rows, poses = self._candidates(levels, pose, thing.colour, own)
        poses, gains = refine(levels, self.gallery.small(rows, thing.colour, self.background), poses, 4)
        is_own = torch.tensor([row in own for row in rows])
        chosen = [
            int(k)
            for mask, most in ((is_own, OWN), (~is_own, FINALISTS))
            for k in gains.masked_fill(~mask, -torch.inf).topk(min(most, int(mask.sum()))).indices
        ]
        rows, poses = [rows[k] for k in chosen], poses[chosen]
        poses, gains = refine(levels, self.gallery.large(rows, thing.colour, self.background), poses, 3)
        best = max((k for k in range(len(rows)) if rows[k] in own), key=gains.__getitem__)
        near = gains >= gains[best] - CLOSE * _energy(seen) / seen[0].numel()
        kept = [k for k in range(len(rows)) if near[k] or k == best]
        rows, poses = [rows[k] for k in kept], poses[kept]
        errors = [_energy(seen - self._draw(i, row, where)) for row, where in zip(rows, poses, strict=True)]
        order = sorted(range(len(rows)), key=errors.__getitem__)
        best = next(k for k in order if rows[k] in own)
        # an image of the same name in another style counts only if a style was asked for
        names = [self.gallery.index[row].name for row in rows]
        rivals = [
            errors[k]
            for k in order
            if rows[k] not in own and (names[k] != thing.name or thing.style is not None)
        ]
        least = LEAST_TIE * _energy(seen)
        rank = sum(errors[best] > error * TIE + least for error in rivals)
        return rows[best], poses[best], rows[order[0]], rank

    def _candidates(
        self, levels: list[Tensor], pose: Tensor, colour: str | None, own: Sequence[int]
    ) -> tuple[list[int], Tensor]:
        """Return a thing's own rows and the rows of the nearest other images, and poses (n, 4)."""
        starts = around(pose, SHIFTS, SCALES)
        shown = sample(levels, starts, COARSE)  # (K, 3, 12, 12)
        found = self.gallery.coarse_gains(shown, starts[:, 2], colour, self.background)  # (K, N)
        gains, which = found.max(0)
        most = min(CANDIDATES, len(gains) - len(own))
        rows = [*own, *gains.index_fill(0, torch.tensor(own), -torch.inf).topk(most).indices.tolist()]
        return rows, starts[which[rows]]

    def _colour(self, i: int, row: int, pose: Tensor, seen: Tensor) -> tuple[str | None, float]:
        """Return the nearest colour, or None for the image's own, and the error in it.

        If no colour is asked for, they are None and the error in the own colour.

        Its own colours do not count if they are nearer to the asked colour than to the others: a thing that
        is blue by itself is blue.
        """
        asked = self.facts.things[i].colour
        natural = self._draw(i, row, pose, None)
        if asked is None:
            return None, _energy(seen - natural)
        drawn = {colour: self._draw(i, row, pose, colour) for colour in THING_COLOURS}
        errors: dict[str | None, float] = {colour: _energy(seen - one) for colour, one in drawn.items()}
        if min(drawn, key=lambda colour: _energy(natural - drawn[colour])) != asked:
            errors[None] = _energy(seen - natural)
        nearest = min(errors, key=errors.__getitem__)
        return nearest, errors[nearest]

    def _draw(self, i: int, row: int, pose: Tensor, colour: str | None = "asked") -> Tensor:
        """Return what a row's image adds to the background at a pose, (3, S, S)."""
        x, y, side, tilt = pose.tolist()
        colour = self.facts.things[i].colour if colour == "asked" else colour
        facts = Facts(
            things=(Thing(name=self.gallery.index[row].name, colour=colour),), background=self.background
        )
        placement = Placement(thing=0, row=row, x=x, y=y, side=side, tilt=math.degrees(tilt))
        scene = Scene(facts=facts, placements=(placement,))
        pixels = render(scene, self.gallery.images, self.image.shape[-1])
        drawn = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        return smooth(drawn - rgb(self.background).view(3, 1, 1))

    def _square(self, pose: Tensor) -> Tensor:
        """Return 1 in the square in which a thing is compared, and 0 elsewhere, (S, S)."""
        x, y, side, _ = pose.tolist()
        ticks = (torch.arange(self.image.shape[-1]) + 0.5) / self.image.shape[-1]
        half = side * REACH / 2
        return ((ticks - y).abs() <= half)[:, None] * ((ticks - x).abs() <= half)[None, :]


def smooth(image: Tensor) -> Tensor:
    """Return an image (3, H, W) averaged with the weights 1, 2, 1 in both directions."""
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    padded = F.pad(image[None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, torch.outer(weights, weights).expand(3, 1, 3, 3), groups=3)[0]


def seen_background(image: Tensor) -> tuple[str, Tensor]:
    """Return the background's name in the palette and its colour (3,), read along the border.

    The colour of the palette that most pixels of the border, a thirty-second of the width, are near to.
    """
    width = max(1, image.shape[-1] // 32)
    inner = torch.zeros(image.shape[1:], dtype=torch.bool)
    inner[width:-width, width:-width] = True
    border = image[:, ~inner].T  # (pixels, 3)
    names = list(PALETTE)
    distances = torch.cdist(border, torch.stack([rgb(name) for name in names]))
    nearest = distances.argmin(1)
    name = names[int(nearest.bincount(minlength=len(names)).argmax())]
    return name, border[nearest == names.index(name)].median(0).values


def _rows(gallery: SceneGallery, thing: Thing) -> list[int]:
    """Return the rows of the images that may show a thing."""
    if thing.style is not None:
        return [gallery.index.find(thing.name, thing.style)]
    if thing.name not in gallery.index.rows_of:
        raise ValueError(f"name {thing.name!r}: the data set has no image of it")
    return list(gallery.index.rows_of[thing.name])


def _energy(image: Tensor) -> float:
    return float(image.square().sum())


def _overlap(one: Tensor, other: Tensor) -> float:
    """Return the share of the smaller of two poses' squares that the other covers."""
    half = (one[2] + other[2]) / 2
    smaller = min(float(one[2]), float(other[2]))
    sides = [min(float(half - (one[k] - other[k]).abs()), smaller) for k in (0, 1)]
    return max(sides[0], 0.0) * max(sides[1], 0.0) / smaller**2


def _apart(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> list[tuple[int, Tensor]]:
    """Return the poses of two things that do not overlap and explain most; one if there is no second."""
    pairs = [
        (float(first[1][i] + second[1][j]), [(0, first[0][i]), (1, second[0][j])])
        for i, j in itertools.product(range(len(first[0])), range(len(second[0])))
        if _overlap(first[0][i], second[0][j]) < MOST_OVERLAP
    ]
    return max(pairs, key=lambda pair: pair[0])[1] if pairs else []


def _separate(poses: Tensor, gains: Tensor, count: int) -> list[tuple[int, Tensor]]:
    """Return at most `count` poses of one thing that explain most, without overlaps."""
    chosen: list[tuple[int, Tensor]] = []
    for k in gains.argsort(descending=True):
        if len(chosen) < count and all(_overlap(poses[k], pose) < MOST_OVERLAP for _, pose in chosen):
            chosen.append((0, poses[k]))
    return chosen
