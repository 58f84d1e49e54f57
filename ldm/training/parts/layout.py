"""Training of the prior over layouts of a model with exemplars; see `ldm.models.layout`.

The text tower is that of the denoiser's training, and frozen. The images of the data set are read for the
library only, which is exported with the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.conditioning.exemplar_library import Exemplar, ExemplarLibrary, write_exemplar
from ldm.conditioning.layouts import (
    INSTANCES,
    LAYOUT_PREDICTION,
    LAYOUT_STEPS,
    draw_layouts,
    draw_states,
    layout_denoiser,
    slots_of,
)
from ldm.data import EmojiData, Scene
from ldm.data.noun_senses import head_nouns, noun_table
from ldm.data.wording import grammar_words
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.dit import DiT, DiTConfig
from ldm.models.layout import ThingLayout, layout_state
from ldm.training.config import DataConfig, RunConfig
from ldm.training.diffusion import DiffusionConfig
from ldm.training.draws import Draws
from ldm.training.images import image_grid
from ldm.training.inputs.emoji import EmojiImages
from ldm.training.inputs.slots import scene_layouts, slot_captions
from ldm.training.losses.common import diffusion_loss, draw_diffusion_loss
from ldm.training.parts.exemplar import zero_residuals
from ldm.weights.formats.exemplar_file import write_library
from ldm.weights.formats.ldm_folder import SLOT_TEXT, read_part, read_text, write_part

TEACHER_STEPS = 12
"""Evaluations of the teacher for a layout."""


@dataclass(frozen=True, kw_only=True)
class LayoutTraining:
    """The configuration of the training.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        text: Folder of the text tower of a training of `part: exemplar`.
        model: Shape of the network; its channels are four and the number of slots, its patch is 1.
        teacher: Folder of a trained prior, whose layouts the network learns to draw in one evaluation; of the
            same shape, it is where the training begins. None for a prior that is trained on scenes. Default:
            None.
    """

    run: RunConfig
    data: DataConfig
    text: str
    model: DiTConfig
    teacher: str | None = None

    def __post_init__(self) -> None:
        try:
            slots_of(self.model)
        except ValueError as error:
            raise ValueError(f"model: {error}") from None


class LayoutPart:
    """A prior over layouts in training."""

    def __init__(self, config: LayoutTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = EmojiImages(config.data)
        self.text = read_text(config.text, SLOT_TEXT).to(device).requires_grad_(False)
        torch.manual_seed(config.run.seed)
        self.net = DiT(config.model)
        zero_residuals(self.net)
        self.denoiser = layout_denoiser(self.net.to(device))
        self.teacher = None if config.teacher is None else self.begin_as(config.teacher)
        self.steps = LAYOUT_STEPS if self.teacher is None else 1
        self.diffusion = DiffusionConfig(schedule="cosine", prediction=LAYOUT_PREDICTION)
        self.model = nn.ModuleDict({"net": self.net})

    def begin_as(self, folder: str) -> Denoiser:
        """Return the denoiser of a trained prior; the network gets its weights if it has its shape.

        Raises:
            ValueError: If the prior in the folder is none, or has other channels or another width of texts.
        """
        net, _ = read_part(folder, "layout", DiTConfig, DiT)
        assert isinstance(net, DiT)
        own, its = self.net.config, net.config
        if (own.in_channels, own.context_dim) != (its.in_channels, its.context_dim):
            raise ValueError(
                f"teacher: the prior in {folder!r} has in_channels {its.in_channels}, context_dim"
                f" {its.context_dim}: expected those of the model, {own.in_channels} and {own.context_dim}"
            )
        if own == its:
            self.net.load_state_dict(net.state_dict())
        return layout_denoiser(net.to(self.device).requires_grad_(False))

    def inputs(
        self, scenes: Sequence[Scene], rngs: Sequence[np.random.Generator] | None
    ) -> tuple[ThingLayout, Cond]:
        """Return the layouts of scenes and the condition of their captions, which generators vary."""
        captions = slot_captions(scenes, self.images.index, rngs)
        with torch.no_grad():
            states = self.text.encode([caption.ids(self.text.tokenizer) for caption in captions])
        assert states.mask is not None
        layout = scene_layouts(scenes, [caption.order for caption in captions])
        return layout, Cond(context=states.tokens, context_mask=states.mask)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the layouts of random scenes; with a teacher, the distance from its layouts."""
        layout, cond = self.inputs(self.images.draw(draws), draws.rngs)
        if self.teacher is not None:
            shape = (len(layout.owner), self.config.model.in_channels, 1, INSTANCES)
            return draws.mean(self.distances(self.teacher, cond, draws.normal(*shape).to(self.device))), {}
        state = layout_state(layout, slots_of(self.config.model)).to(self.device)  # (B, 4 + K, 1, M)
        return draw_diffusion_loss(self.denoiser, self.diffusion, state, cond, draws).weighted, {}

    def distances(self, teacher: Denoiser, cond: Cond, noise: Tensor) -> Tensor:
        """Return the mean squared distance of one evaluation from what the teacher makes of noise, (B,).

        This is the distillation of a sampler into one step of Luhman and Luhman 2021, which suffices for the
        few numbers of a layout.
        """
        drawn = draw_states(teacher, cond, noise, TEACHER_STEPS)
        t = torch.full((len(noise),), len(teacher.schedule) - 1, device=self.device)
        return (self.denoiser(noise, t, cond).x0 - drawn).square().flatten(1).mean(1)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.images.draw(draws))

    def validate(self) -> dict[str, float]:
        """Return the loss of 256 scenes at fixed timesteps and noise, and how often drawn layouts fit.

        With a teacher the loss is the distance from its layouts. A layout fits if it has as many instances of
        each thing as the scene.
        """
        scenes = self.images.random(np.random.default_rng(7), 256)
        layout, cond = self.inputs(scenes, None)
        draws, state = Draws(7, range(len(scenes))), layout_state(layout, slots_of(self.config.model))
        t, eps = self.diffusion.draw(draws), draws.normal(*state.shape)
        state, t, eps = (value.to(self.device) for value in (state, t, eps))
        if self.teacher is None:
            losses = diffusion_loss(self.denoiser, state, cond, t, eps)
        else:
            losses = self.distances(self.teacher, cond, eps)
        things = [len(scene.facts.things) for scene in scenes]
        drawn = draw_layouts(self.denoiser, cond, things, seeds=range(len(scenes)), steps=self.steps)
        fits = (drawn.owner.sort().values == layout.owner.to(drawn.owner).sort().values).all(dim=1)
        return {"loss": float(losses.mean()), "counts_right": float(fits.float().mean())}

    def preview(self) -> np.ndarray:
        """Show drawn layouts of 32 scenes as filled squares, one color for each slot."""
        scenes = self.images.random(np.random.default_rng(3), 32)
        _, cond = self.inputs(scenes, None)
        things = [len(scene.facts.things) for scene in scenes]
        drawn = draw_layouts(self.denoiser, cond, things, seeds=range(len(scenes)), steps=self.steps)
        return image_grid(squares_of(drawn, 64), columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the network, and the library of training images."""
        write_part(
            folder,
            "layout",
            self.net,
            self.config.model,
            layout_steps=self.steps,
            figures=self.validate(),
            training=record,
        )
        write_library(folder, training_library(self.images.data))


def squares_of(layout: ThingLayout, size: int) -> np.ndarray:
    """Return layouts as squares without tilt on white, (B, size, size, 3) uint8."""
    colors = np.array([(220, 50, 47), (50, 100, 210), (60, 160, 80), (240, 140, 40)], dtype=np.uint8)
    images = np.full((len(layout.owner), size, size, 3), 255, dtype=np.uint8)
    for image, places, owner in zip(images, layout.places.tolist(), layout.owner.tolist(), strict=True):
        for (x, y, side, _), slot in zip(places, owner, strict=True):
            if slot >= 0:
                top, left, bottom, right = (
                    max(0, round(size * v)) for v in (y - side / 2, x - side / 2, y + side / 2, x + side / 2)
                )
                image[top:bottom, left:right] = colors[slot]
    return images


def training_library(data: EmojiData) -> ExemplarLibrary:
    """Return the library of all training images, with the nouns of their names and the heads of these."""
    rows = [int(row) for row in data.train]
    exemplars = [
        Exemplar(
            name=data.index[row].name,
            style=data.index[row].style,
            content=write_exemplar(torch.from_numpy(data.images[row].copy()).movedim(-1, 0).float() / 255),
        )
        for row in rows
    ]
    known = {exemplar.name for exemplar in exemplars}
    nouns = {
        noun: tuple(dict.fromkeys(sense.name for sense in senses if sense.name in known))
        for noun, senses in noun_table(data.index).items()
    }
    nouns = {noun: names for noun, names in nouns.items() if names}
    nouns |= head_nouns(known, {*nouns, *grammar_words()})
    return ExemplarLibrary(exemplars, nouns, size=data.images.shape[1])
