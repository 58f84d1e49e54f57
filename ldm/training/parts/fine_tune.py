"""Fine-tuning of a model that `ldm.load` reads: its UNet, its text towers, or both.

The loss is that of latent diffusion (Rombach et al. 2022, eq. 3) with the schedule, the prediction and the
conditions of the model's card. The export is a whole model, which `ldm.load(weights=...)` reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm.catalog.cards import ModelCard
from ldm.conditioning.prompt import escape_prompt
from ldm.diffusion.cond import Cond
from ldm.diffusion.interfaces import Prediction
from ldm.models.labels import LabelConditioner
from ldm.models.layers.embeddings import vector_condition
from ldm.pipelines.conditions import zero_where_empty
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.stages.space import Space
from ldm.registry.loading import load
from ldm.registry.saving import save
from ldm.support.config import nearest
from ldm.training.caches.latents import LatentSpace
from ldm.training.config import RunConfig
from ldm.training.diffusion import DiffusionConfig, sample_latents
from ldm.training.draws import Draws
from ldm.training.images import image_grid, to_uint8
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import Samples
from ldm.training.losses.common import diffusion_loss, draw_diffusion_loss, losses_by_timestep
from ldm.training.recomputing import recompute_blocks

Trained = Literal["unet", "text", "text2"]
FIXED_IMAGES = 64  # of the validation


@dataclass(frozen=True, kw_only=True)
class FineTuneDiffusion:
    """What fine-tuning may change in the diffusion of a model; see `DiffusionConfig` for the other fields.

    Args:
        prediction: What the network learns to predict; None for what it predicts. Default: None.
        zero_terminal_snr: Whether the schedule ends at a signal-to-noise ratio of zero; None for the model's.
            Sampling then visits the last timestep ("trailing" spacing). Default: None.
    """

    prediction: Prediction | None = None
    zero_terminal_snr: bool | None = None
    min_snr: float | None = None
    snr_plus_one: float | None = None
    offset_noise: float = 0.0
    drop: float = 0.1
    shift: float = 1.0

    def changed(self, card: ModelCard) -> ModelCard:
        """Return the card of the fine-tuned model."""
        schedule, convention = card.schedule, card.convention
        zero = self.zero_terminal_snr
        if zero is not None and zero != schedule.zero_terminal_snr:
            schedule = replace(schedule, zero_terminal_snr=zero)
            convention = replace(card.grids(), grids={"*": {"spacing": "trailing"}})
        return replace(
            card,
            schedule=schedule,
            prediction=self.prediction or card.prediction,
            convention=convention,
            hub=None,
            files=None,
            folder=None,
        )

    def settled(self, card: ModelCard) -> DiffusionConfig:
        """Return the loss of a model with a card that `changed` returned.

        Raises:
            ValueError: If the model's schedule has no timesteps of its own (EDM).
        """
        schedule = card.schedule
        if schedule.kind == "edm":
            raise ValueError(f"{card.name!r} has an EDM schedule, with which nothing is trained here")
        return DiffusionConfig(
            schedule=schedule.kind,
            timesteps=schedule.timesteps,
            prediction=card.prediction,
            zero_terminal_snr=schedule.zero_terminal_snr,
            min_snr=self.min_snr,
            snr_plus_one=self.snr_plus_one,
            offset_noise=self.offset_noise,
            drop=self.drop,
            shift=self.shift,
        )


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The configuration of a fine-tuning.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        base: Name of the model (see `ldm.list_models`); None for that of the folder `weights`.
        weights: Its weights, as `ldm.load` takes them; None for the model's own. Default: None.
        train: The networks that are trained: "unet", "text", and SDXL's "text2". Default: the UNet.
        diffusion: Changes of the diffusion, and the weights of the loss.
        recompute: Whether blocks compute their activations again in the backward pass, which takes less
            memory and more time. Default: False.
    """

    run: RunConfig
    data: DataSection
    base: str | None = None
    weights: str | None = None
    train: tuple[Trained, ...] = ("unet",)
    diffusion: FineTuneDiffusion = field(default_factory=FineTuneDiffusion)
    recompute: bool = False

    def __post_init__(self) -> None:
        check_base(self.base, self.weights)
        if not self.train or len(set(self.train)) < len(self.train):
            raise ValueError(f"train: expected different networks, got {list(self.train)}")


class FineTunePart:
    """A loaded model in training."""

    def __init__(self, config: FineTuning, device: torch.device) -> None:
        self.config, self.device = config, device
        loaded = load_base(config.base, config.weights)
        self.pipe = fine_tuned(loaded, config.diffusion.changed(loaded.card)).to(device)
        self.diffusion = config.diffusion.settled(self.pipe.card)
        networks = self.pipe.networks()
        for name in config.train:
            if name not in networks:
                raise ValueError(f"train: {self.pipe.name!r} has no {name!r}; {nearest(name, networks)}")
        self.pipe.requires_grad_(False)
        self.model = nn.ModuleDict({name: networks[name] for name in config.train}).requires_grad_(True)
        if config.recompute:
            recompute_blocks(self.model)
        self.images = open_images(config.data, config.run)
        if self.images.size % self.pipe.vae.config.factor:
            raise ValueError(
                f"data.size {self.images.size}: expected a multiple of {self.pipe.vae.config.factor}, the"
                " autoencoder's factor"
            )
        self.samples = self.images.cached(config.run, 0)
        card = self.pipe.card
        space = Space(self.pipe.vae, self.pipe.latent_scale, card.latent_mean, card.latent_std)
        self.latents = LatentSpace.of(space, content_key(self.pipe.vae), self.samples, device)

    def cond(self, texts: Sequence[str], samples: Samples) -> Cond:
        """Return the condition of texts, and of the samples' sizes where the model reads them."""
        if self.pipe.text is None:
            return Cond()
        cond: Cond = self.pipe.text([escape_prompt(text) for text in texts])
        if self.pipe.card.zero_negative:
            cond = zero_where_empty(cond, texts)
        if self.pipe.card.vector is None:
            return cond
        assert cond.pooled is not None
        sizes = [[*size.original, *size.crop, *size.target] for size in self.images.sizes(samples)]
        numbers = torch.tensor(sizes, dtype=torch.float32, device=cond.pooled.device)
        return replace(cond, pooled=vector_condition(cond.pooled, numbers))

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a random batch, and the losses of each tenth of the timesteps to log."""
        chosen, rows = self.samples.draw(draws)
        x0 = self.latents.sample(rows, draws)  # (B, C, h, w)
        texts = self.images.captions(chosen, draws, drop=self.diffusion.drop)
        cond = self.cond(texts, chosen)
        loss, losses, t = draw_diffusion_loss(self.pipe.denoiser, self.diffusion, x0, cond, draws)
        return loss, losses_by_timestep(losses, t, self.diffusion.timesteps, draws)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.samples.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return the loss at fixed timesteps and noise over held-out images, or over training images."""
        chosen = self.images.held_out(FIXED_IMAGES) or self.images.plain(FIXED_IMAGES, seed=7)
        losses = []
        for start in range(0, len(chosen), 8):
            part = chosen[start : start + 8]
            draws, x0 = Draws(7, range(start, start + len(part))), self.latents.encode(part)
            t = self.diffusion.draw(draws).to(self.device)
            eps = draws.normal(*x0.shape).to(self.device)
            cond = self.cond(self.images.describe(part), part)
            losses.append(diffusion_loss(self.pipe.denoiser, x0, cond, t, eps).cpu())
        return {"loss": float(torch.cat(losses).mean())}

    def preview(self) -> np.ndarray:
        """Show samples of the captions of eight images, each beside the image."""
        chosen = self.images.plain(8, seed=3)
        cond, uncond = (
            self.cond(texts, chosen) for texts in (self.images.describe(chosen), [""] * len(chosen))
        )
        z = sample_latents(
            self.pipe.denoiser,
            cond,
            uncond,
            self.latents.shape,
            n=len(chosen),
            steps=20,
            guidance=self.pipe.card.defaults.guidance if self.pipe.text is not None else 1.0,
            seed=0,
        )
        made = [self.latents.decode(part[None]).cpu() for part in z]
        pairs = torch.stack([self.images.tensor(chosen), torch.cat(made)], 1).flatten(0, 1)
        return image_grid(to_uint8(pairs), columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the whole model, with half precision."""
        save(self.pipe, folder, dtype="float16", training=record, figures=self.validate())


def check_base(base: str | None, weights: str | None) -> None:
    """Raise ValueError unless a model is named, by its name or by its weights."""
    if base is None and weights is None:
        raise ValueError("expected the name of a model as base, or the folder of a model as weights")


def load_base(base: str | None, weights: str | None) -> LatentDiffusion:
    """Load the model that a training begins with, in float32.

    Raises:
        FileNotFoundError: If its weights are absent.
        ValueError: If it is not a latent diffusion model that is conditioned on texts, or on nothing.
    """
    pipe = load(base, weights=weights, device="cpu", dtype="float32")
    if not isinstance(pipe, LatentDiffusion):
        raise ValueError(f"base {base or weights!r}: expected a latent diffusion model")
    card = pipe.card
    if card.concat is not None or card.vector == "aesthetic" or isinstance(pipe.text, LabelConditioner):
        reads = "classes" if isinstance(pipe.text, LabelConditioner) else card.concat or "aesthetic scores"
        raise ValueError(f"base {card.name!r} reads {reads}, which a data set of captioned images lacks")
    return pipe


def fine_tuned(pipe: LatentDiffusion, card: ModelCard) -> LatentDiffusion:
    """Return a pipeline with the networks of another one, and a card of its own."""
    return LatentDiffusion(
        vae=pipe.vae,
        text=pipe.text,
        denoiser=card.make_denoiser(pipe.denoiser.net),
        latent_scale=pipe.latent_scale,
        card=card,
    ).eval()


def content_key(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights and their names."""
    found = hashlib.sha256()
    state: dict[str, Any] = network.state_dict()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
