"""What a decoder of image tokens reads in training: spelled captions, or scenes as a model with exemplars.

Both draw cached samples and give the states of a batch, drawn or canonical.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.token_texts import EncodedTexts, TextStates, encode_condition
from ldm.data import Scene
from ldm.models.dalle.encoder import StateEncoder
from ldm.training.config import RunConfig
from ldm.training.draws import Draws
from ldm.training.inputs.emoji import CachedScenes, EmojiImages
from ldm.training.inputs.protocol import CachedSamples, Samples, TrainingImages
from ldm.training.inputs.slots import scene_condition, scene_layouts, slot_captions


class TokenReader(Protocol):
    """What gives a decoder in training the states of samples."""

    @property
    def encoder(self) -> nn.Module:
        """The encoder in training."""

    @property
    def samples(self) -> CachedSamples:
        """The cached samples."""

    def draw(self, draws: Draws) -> tuple[Samples, list[int]]:
        """Return the samples of a step and their rows in the cache."""

    def drawn(self, samples: Samples, draws: Draws, drop: float) -> TextStates:
        """Return the states of the samples of a step, a share `drop` of which are given no condition."""

    def canonical(self, samples: Samples) -> TextStates:
        """Return the states of samples by their canonical captions."""

    def nothing(self, count: int) -> TextStates:
        """Return the states of no condition for `count` images."""


class CaptionReader:
    """Captions of any images, which an encoder of ids reads.

    Args:
        texts: The tokenizer and the encoder.
        images: The training images.
        run: The run.
        variants: See `TrainingImages.cached`.
    """

    def __init__(self, texts: EncodedTexts, images: TrainingImages, run: RunConfig, variants: int) -> None:
        self.texts, self.images, self.encoder = texts, images, texts.encoder
        self.samples = images.cached(run, variants)

    def draw(self, draws: Draws) -> tuple[Samples, list[int]]:
        """Return the samples of a step and their rows in the cache."""
        return self.samples.draw(draws)

    def drawn(self, samples: Samples, draws: Draws, drop: float) -> TextStates:
        """Return the states of drawn captions."""
        return self.texts.encode(self.images.captions(samples, draws, drop=drop))

    def canonical(self, samples: Samples) -> TextStates:
        """Return the states of canonical captions."""
        return self.texts.encode(self.images.describe(samples))

    def nothing(self, count: int) -> TextStates:
        """Return the states of empty captions."""
        return self.texts.encode([""] * count)


class SceneReader:
    """Scenes of the emoji data set, whose things are shown where they lie.

    Args:
        text: The text tower of a model with exemplars, which is frozen.
        encoder: The encoder of its states.
        images: The data set.
        run: The run.
        scenes: Number of cached scenes.
    """

    def __init__(
        self, text: TextConditioner, encoder: StateEncoder, images: EmojiImages, run: RunConfig, scenes: int
    ) -> None:
        self.text, self.encoder, self.images = text, encoder, images
        self.samples = CachedScenes.random(run, images, scenes)

    def draw(self, draws: Draws) -> tuple[list[Scene], list[int]]:
        """Return the scenes of a step and their rows in the cache."""
        rows = [int(row) for row in draws.integers(len(self.samples.rows))]
        return [self.samples.rows[row] for row in rows], rows

    def drawn(self, samples: Sequence[Scene], draws: Draws, drop: float) -> TextStates:
        """Return the states of scenes in drawn words."""
        kept = draws.random() >= drop
        scenes = [scene if keep else None for scene, keep in zip(samples, kept, strict=True)]
        return self._read(scenes, draws.rngs)

    def canonical(self, samples: Sequence[Scene]) -> TextStates:
        """Return the states of scenes in canonical words."""
        return self._read(samples, None)

    def nothing(self, count: int) -> TextStates:
        """Return the states of empty captions with an empty canvas."""
        return self._read([None] * count, None)

    def _read(self, scenes: Sequence[Scene | None], rngs: Sequence[np.random.Generator] | None) -> TextStates:
        captions = slot_captions(scenes, self.images.index, rngs)
        layout = scene_layouts(scenes, [caption.order for caption in captions])
        slots = self.encoder.config.slots
        with torch.no_grad():
            cond = scene_condition(scenes, captions, layout, images=self.images, text=self.text, slots=slots)
        return encode_condition(self.encoder, cond)
