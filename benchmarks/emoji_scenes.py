"""Scenes of one thing in the data set, as prompts of the benchmarks ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.data import PALETTE, STYLES, EmojiData, Scene, held_out_background, plain_scene, render_batch

BACKGROUNDS = tuple(colour for colour in PALETTE if colour != "white")


def draw_training(
    data: EmojiData, n: int, rng: np.random.Generator, styles: Sequence[str] = STYLES
) -> list[Scene]:
    """Return n distinct training images of some styles, whole; every other one on a random background.

    No (name, background) combination is held out.
    """
    drawn = []
    for i, row in enumerate(rng.permutation(rows_of_styles(data, styles))[:n]):
        name = data.index[int(row)].name
        allowed = [background for background in BACKGROUNDS if not held_out_background(name, background)]
        background = allowed[rng.integers(len(allowed))] if i % 2 else None
        drawn.append(plain_scene(data.index, int(row), background))
    return drawn


def draw_held_out_backgrounds(
    data: EmojiData, n: int, rng: np.random.Generator, styles: Sequence[str] = STYLES
) -> list[Scene]:
    """Return n training images of some styles on backgrounds that are held out for their names."""
    pairs = [
        (int(row), background)
        for row in rows_of_styles(data, styles)
        for background in BACKGROUNDS
        if held_out_background(data.index[int(row)].name, background)
    ]
    return [plain_scene(data.index, *pairs[i]) for i in rng.permutation(len(pairs))[:n]]


def rows_of_styles(data: EmojiData, styles: Sequence[str]) -> np.ndarray:
    """Return the rows of the training images of some styles."""
    return np.array([row for row in data.train if data.index[int(row)].style in styles], dtype=np.int64)


def draw_held_out_images(
    data: EmojiData, rng: np.random.Generator, styles: Sequence[str] = STYLES
) -> list[Scene]:
    """Return every held-out image of some styles once, every other one on a random background."""
    rows = [int(row) for row in data.held_out if data.index[int(row)].style in styles]
    colours = tuple(PALETTE)
    backgrounds = [colours[rng.integers(len(colours))] if i % 2 else None for i in range(len(rows))]
    return [
        plain_scene(data.index, row, background) for row, background in zip(rows, backgrounds, strict=True)
    ]


def real(scenes: Sequence[Scene], data: EmojiData, size: int) -> Tensor:
    """Render scenes from the data set, (B, 3, size, size) in [0, 1]."""
    return torch.from_numpy(render_batch(scenes, data.images, size)).permute(0, 3, 1, 2).float() / 255


def asked(scenes: Sequence[Scene]) -> tuple[list[str], list[str | None]]:
    """Return the names and the backgrounds that the captions of scenes of one thing ask for."""
    return [scene.facts.things[0].name for scene in scenes], [scene.facts.background for scene in scenes]
