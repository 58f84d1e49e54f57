"""Distillation by reflow: a student draws a model's images in a few evaluations, without guidance.

The sampler of the teacher maps noise eps to a latent x0. The student is trained on x_t = alpha_t·x0 +
sigma_t·eps with the very eps that x0 was drawn from, so that the prediction from any x_t has one answer, even
from pure noise (Liu et al. 2023, Flow Straight and Fast, arXiv:2209.03003; Liu et al. 2024, InstaFlow,
arXiv:2309.06380). The teacher's images are guided, so the student needs no guidance (Meng et al. 2023,
arXiv:2210.03142).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.catalog.lookup import parse_card
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Prediction
from ldm.pipelines.latent import LatentDiffusion
from ldm.registry.bundling import bundle
from ldm.registry.loading import load
from ldm.samplers.ode.ddim import ddim
from ldm.support.config import read_yaml
from ldm.support.text import shown
from ldm.training.caches.pairs import Pairs, conditions, teacher_pairs
from ldm.training.caches.rows import CACHES
from ldm.training.config import RunConfig, check_at_least
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.losses.common import diffusion_loss
from ldm.training.tuning.base_model import network_hashes
from ldm.weights.formats.ldm_folder import about_part, write_part

HELD_OUT = 64  # the last pairs, which are validated on


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model that a student is distilled from: one that `ldm.load` reads, or a card and trained parts.

    Args:
        model: Name of a model. Default: none.
        weights: Its weights, as `ldm.load` takes them. Default: none.
        card: File of the card, where the model is made of parts. Default: none.
        parts: The folder of each part. Default: none.
        steps: Sampling steps of its images. Default: the card's.
        guidance: Their guidance scale. Default: the card's.
    """

    model: str | None = None
    weights: str | None = None
    card: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        named = self.model is not None or self.weights is not None
        if named == (self.card is not None):
            raise ValueError("teacher: expected model or weights, or a card with parts, but not both")

    def load(self, device: torch.device, dtype: str | None) -> LatentDiffusion:
        """Return the teacher, in the fastest safe dtype where none is named."""
        if self.card is None:
            pipe = load(self.model, weights=self.weights, device=device, dtype=dtype)
        else:
            pipe = load(weights=self.bundled(self.card), device=device, dtype=dtype)
        if not isinstance(pipe, LatentDiffusion):
            raise ValueError(f"teacher: expected a latent diffusion model, got {type(pipe).__name__}")
        return pipe

    def bundled(self, card: str) -> Path:
        """Return the folder of the model that the parts make, named by their hashes."""
        mapping = read_yaml(card)
        content = [mapping, {part: about_part(own, part)["sha256"] for part, own in self.parts.items()}]
        key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return bundle(parse_card(mapping, card), self.parts, CACHES / f"teacher-{key}")

    def options(self) -> dict[str, Any]:
        """Return the options of its images that differ from the card's."""
        options = {"steps": self.steps, "guidance": self.guidance}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ReflowTraining:
    """The configuration of a distillation.

    Args:
        run: Length, batches and optimizer.
        teacher: The model that draws the pairs, and whose denoising network the student begins with.
        prompts: Text file of prompts, one in a line, that pairs take in turn; None for captions of `data`.
            Default: None.
        data: The training images whose captions are the prompts; None for `prompts`. Default: None.
        pairs: Number of pairs.
        grids: Numbers of steps that the student is trained for. Default: (1, 2, 4).
        prediction: What the student predicts. Default: as the teacher.
    """

    run: RunConfig
    teacher: Teacher
    prompts: str | None = None
    data: DataSection | None = None
    pairs: int
    grids: tuple[int, ...] = (1, 2, 4)
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        check_at_least(HELD_OUT + 1, pairs=self.pairs)
        if (self.prompts is None) == (self.data is None):
            raise ValueError("expected one of prompts and data")
        if not self.grids or min(self.grids) < 1:
            raise ValueError(f"grids: expected numbers of steps of at least 1, got {list(self.grids)}")

    def texts(self) -> list[str]:
        """Return a prompt for each pair."""
        if self.data is not None:
            images, draws = open_images(self.data, self.run), Draws(self.run.seed, range(self.pairs))
            return images.captions(images.draw(draws), draws)
        assert self.prompts is not None
        lines = Path(self.prompts).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"prompts {shown(self.prompts)}: expected a prompt in each line, got none")
        return [prompts[i % len(prompts)] for i in range(self.pairs)]


class ReflowPart:
    """A student in training."""

    def __init__(self, config: ReflowTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.teacher = config.teacher.load(device, "float32").requires_grad_(False)
        # layouts of exemplars that are drawn in another dtype are not those that the student is shown
        shows = isinstance(self.teacher.text, ExemplarConditioner)
        drawing = self.teacher if shows else config.teacher.load(device, None)
        self.pairs: Pairs = teacher_pairs(drawing, config.texts(), **config.teacher.options())
        self.base_hashes = network_hashes(self.teacher.networks())
        own = self.teacher.denoiser
        prediction = config.prediction or own.prediction
        if prediction == "eps":
            raise ValueError(
                "prediction 'eps': noise predicted from noise says nothing of an image; expected v or x0,"
                " which a network that predicts eps can learn"
            )
        torch.manual_seed(config.run.seed)
        self.net = copy.deepcopy(own.net).requires_grad_(True)
        self.denoiser = Denoiser(self.net, own.schedule, prediction)
        self.grids = [TimeGrid.make(own.schedule, n, spacing="trailing") for n in config.grids]
        self.model = self.net

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a random batch, and to log the loss at the first timestep."""
        t = self.timesteps(draws)
        losses = self.losses(self.draw(draws), t)
        first = t == self.grids[0].t.max()  # the same for all grids
        return draws.mean(losses), {"loss_first_t": draws.mean_of_some(losses[first])}

    def draw(self, draws: Draws) -> list[int]:
        """Return the pairs of a step."""
        trained = self.config.pairs - HELD_OUT
        return [int(draws.of_sample(g).integers(trained)) for g in draws.samples]

    def timesteps(self, draws: Draws) -> Tensor:
        """Return the timesteps (B,) of a step's samples: for each, one of one of the grids."""
        chosen = []
        for rng in (draws.of_sample(g, use=1) for g in draws.samples):
            t = self.grids[int(rng.integers(len(self.grids)))].t
            chosen.append(t[int(rng.integers(len(t)))])
        return torch.stack(chosen).to(self.device, torch.float32)

    def losses(self, rows: Sequence[int], t: Tensor) -> Tensor:
        """Return the squared errors (B,) of the prediction for pairs at timesteps (B,)."""
        cond = conditions(self.teacher, [self.pairs.prompts[row] for row in rows], rows)
        x0, eps = (value(rows).to(self.device) for value in (self.pairs.latent, self.pairs.noise))
        return diffusion_loss(self.denoiser, x0, cond, t, eps)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the prompts of the samples that `loss` draws."""
        return [self.pairs.prompts[row] for row in self.draw(draws)]

    def held_out(self, n: int) -> list[list[int]]:
        """Return the first n held-out pairs, in batches of up to 16."""
        first = self.config.pairs - HELD_OUT
        rows = list(range(first, first + n))
        return [rows[i : i + 16] for i in range(0, n, 16)]

    @torch.no_grad()
    def sample(self, rows: Sequence[int], grid: TimeGrid) -> Tensor:
        """Return the student's latents (B, C, h, w) of pairs' prompts and noise."""
        cond = conditions(self.teacher, [self.pairs.prompts[row] for row in rows], rows)
        return ddim(self.denoiser.bind(cond), self.pairs.noise(rows).to(self.device), grid)

    def validate(self) -> dict[str, float]:
        """Return the squared error of the student's held-out latents at each number of steps.

        It is relative to the variance of the teacher's latents.
        """
        figures = {}
        for n, grid in zip(self.config.grids, self.grids, strict=True):
            errors, wanted = [], []
            for rows in self.held_out(HELD_OUT):
                own = self.pairs.latent(rows)
                errors.append((self.sample(rows, grid).cpu() - own).square().mean())
                wanted.append(own)
            figures[f"error_{n}"] = float(torch.stack(errors).mean() / torch.cat(wanted).var())
        return figures

    def preview(self) -> np.ndarray:
        """Show held-out images of the teacher, and beside each the student's."""
        shown_rows = self.held_out(8)[0]
        latents = [self.pairs.latent(shown_rows), *(self.sample(shown_rows, grid) for grid in self.grids)]
        images = [2 * self.teacher.decode(z.to(self.device)) - 1 for z in latents]
        return comparison_grid(*images, columns=2 * len(images))

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the student, which takes the place of the teacher's denoising network."""
        card = self.teacher.card
        trained_with = {**card.trained_with(), "prediction": self.denoiser.prediction}
        net: Any = self.net  # a denoising network of any kind, which has a configuration
        write_part(
            folder,
            "unet",
            net,
            net.config,
            diffusion=trained_with,
            figures=self.validate(),
            training=record,
        )
