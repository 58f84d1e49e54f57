"""What all trainings of a loaded latent diffusion model share: data, conditions, loss, validation, preview.

The loss is that of latent diffusion (Rombach et al. 2022, eq. 3) with the schedule, the prediction and the
conditions of the model's card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ldm.catalog.cards import DiffusionCard
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.prompt import escape_prompt
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.interfaces import Prediction
from ldm.models.labels import LabelConditioner
from ldm.models.layers.embeddings import vector_condition
from ldm.pipelines.conditions import zero_where_empty
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.stages.space import Space
from ldm.support.config import nearest
from ldm.training.adapters.class_images import ClassImages, PriorPreservation
from ldm.training.caches.canvases import CanvasFit, FittedCanvases, ImageFit
from ldm.training.caches.latents import LatentSpace
from ldm.training.config import RunConfig
from ldm.training.diffusion import DiffusionConfig, sample_latents
from ldm.training.draws import Draws
from ldm.training.images import image_grid, to_uint8
from ldm.training.inputs.beside import channels_beside
from ldm.training.inputs.cached_files import CachedFiles
from ldm.training.inputs.classes import ClassNumbers
from ldm.training.inputs.files import files_only
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import Samples
from ldm.training.losses.common import diffusion_loss, draw_diffusion_loss, losses_by_timestep
from ldm.training.tuning.base_model import fine_tuned, load_base, network_hashes
from ldm.training.tuning.fine_tune_decoder import FIXED_IMAGES

Trained = Literal["unet", "text", "text2", "class"]
AnyDiffusionCard = TypeVar("AnyDiffusionCard", bound=DiffusionCard)
PREVIEWED = 8  # images of a preview


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

    def changed(self, card: AnyDiffusionCard) -> AnyDiffusionCard:
        """Return the card of the fine-tuned diffusion."""
        schedule, convention = card.schedule, card.convention
        zero = self.zero_terminal_snr
        if zero is not None and zero != schedule.zero_terminal_snr:
            schedule = replace(schedule, zero_terminal_snr=zero)
            convention = replace(card.grids(), grids={"*": {"spacing": "trailing"}})
        prediction = self.prediction or card.prediction
        return replace(card, schedule=schedule, prediction=prediction, convention=convention)

    def settled(self, card: DiffusionCard, name: str) -> DiffusionConfig:
        """Return the loss of a diffusion with a card that `changed` returned.

        Args:
            card: The card.
            name: Name of the model.

        Raises:
            ValueError: If its schedule has no timesteps of its own (EDM).
        """
        schedule = card.schedule
        if schedule.kind == "edm":
            raise ValueError(f"{name!r} has an EDM schedule, with which nothing is trained here")
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


class Tuning(Protocol):
    """The configuration of a training that begins with a loaded model; see `FineTuning` for the fields."""

    @property
    def run(self) -> RunConfig:
        """Length, batches and optimizer."""

    @property
    def data(self) -> DataSection:
        """The training images."""

    @property
    def base(self) -> str | None:
        """Name of the model."""

    @property
    def weights(self) -> str | None:
        """Its weights."""

    @property
    def diffusion(self) -> FineTuneDiffusion:
        """Changes of the diffusion, and the weights of the loss."""

    @property
    def prior(self) -> PriorPreservation | None:
        """Images of the model itself that it keeps drawing."""


class TunedModel:
    """A loaded model whose networks, or what changes them, are trained on captioned images.

    Args:
        config: The configuration.
        device: Where to train.
        train: The networks that are trained, or that what is trained changes. Default: none.
    """

    def __init__(self, config: Tuning, device: torch.device, train: tuple[Trained, ...] = ()) -> None:
        self.device, self.run = device, config.run
        loaded = load_base(config.base, config.weights).to(device)
        self.check(loaded)
        self.trained = trained_networks(loaded, train)
        self.images = open_images(config.data, config.run)
        if self.images.size % loaded.vae.config.factor:
            raise ValueError(
                f"data.size {self.images.size}: expected a multiple of {loaded.vae.config.factor}, the"
                " autoencoder's factor"
            )
        self.preserved = None
        if config.prior is not None:
            if loaded.card.concat is not None or isinstance(loaded.text, LabelConditioner):
                raise ValueError(f"prior: {loaded.name!r} draws no images of a prompt alone")
            self.preserved = ClassImages(config.prior, loaded, self.images.size)
        self.pipe = fine_tuned(loaded, config.diffusion.changed(loaded.card)).to(device)
        self.diffusion = config.diffusion.settled(self.pipe.card, self.pipe.name)
        self.base_hashes = network_hashes(self.pipe.networks())
        self.pipe.requires_grad_(False)
        self.samples = self.images.cached(config.run, 0)
        card = self.pipe.card
        space = Space(self.pipe.vae, self.pipe.latent_scale, card.latent_mean, card.latent_std)
        self.latents = LatentSpace.of(space, self.base_hashes["vae"], self.samples, device)
        self.canvases = self._fitted_canvases()
        self.beside = channels_beside(self.pipe, self.images, config.run.seed)
        self.classes = None
        if isinstance(self.pipe.text, LabelConditioner):
            self.classes = ClassNumbers(self.pipe, self.images, self.diffusion.drop)

    def check(self, pipe: LatentDiffusion) -> None:
        """Raise ValueError for a model that the training does not serve, before it begins."""

    def _fitted_canvases(self) -> FittedCanvases | None:
        """Return what a model with exemplars is shown of the images; None for another model."""
        text, samples = self.pipe.text, self.samples
        if not isinstance(text, ExemplarConditioner) or (fit := self.canvas_fit(text)) is None:
            return None
        files_only(self.images, f"{self.pipe.name!r}, of which part: exemplar trains scenes")
        assert isinstance(samples, CachedFiles)
        others = [*self.fixed_samples(), *self.images.plain(PREVIEWED, seed=3)]
        return FittedCanvases(text, fit, samples, others)

    def canvas_fit(self, text: ExemplarConditioner) -> CanvasFit | None:
        """Return what the layouts of a model with exemplars are fitted to: the images.

        None if they are drawn by seeds.
        """
        return ImageFit(
            text=text, denoiser=self.pipe.denoiser, weights=self.base_hashes, latents=self.latents
        )

    def fixed_samples(self) -> Samples:
        """Return the images that are validated on: held-out ones, or training images."""
        return self.images.held_out(FIXED_IMAGES) or self.images.plain(FIXED_IMAGES, seed=7)

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser in training."""
        return self.pipe.denoiser

    def cond(self, texts: Sequence[str], samples: Samples, seeds: Sequence[int] = ()) -> Cond:
        """Return the condition of texts, and of the samples' sizes where the model reads them.

        Args:
            texts: A caption of each sample, or an empty text.
            samples: B samples.
            seeds: A number for each sample, for conditions that are drawn. Default: 0, 1, ….
        """
        if self.canvases is not None:
            return self.canvases(texts, samples)
        sizes = [[*s.original, *s.crop, *s.target] for s in self.images.sizes(samples)]
        cond = self.cond_of_sizes(texts, sizes)
        if self.beside is None:
            return cond
        return replace(cond, concat=self.beside(self.pipe, samples, seeds or range(len(samples))))

    def drawn_cond(self, texts: Sequence[str], samples: Samples, draws: Draws) -> Cond:
        """Return the condition of a batch, of which parts may be left out at random.

        Args:
            texts: A caption of each sample, or an empty text.
            samples: B samples.
            draws: Their random numbers.
        """
        return self.cond(texts, samples, draws.samples)

    def uncond(self, samples: Samples, seeds: Sequence[int] = ()) -> Cond:
        """Return the condition of the unconditional branch of guidance; see `cond`."""
        return self.cond([""] * len(samples), samples, seeds)

    def read(self, texts: Sequence[str]) -> Cond:
        """Return the condition of texts, which are no prompts: signs of the syntax are text."""
        assert self.pipe.text is not None
        if self.classes is not None:
            return self.pipe.text(self.classes(texts))
        cond: Cond = self.pipe.text([escape_prompt(text) for text in texts])
        return cond

    def cond_of_sizes(self, texts: Sequence[str], sizes: Sequence[Sequence[float]]) -> Cond:
        """Return the condition of texts, and of SDXL's six numbers of sizes where the model reads them."""
        if self.pipe.text is None:
            return Cond()
        cond = self.read(texts)
        if self.pipe.card.zero_negative:
            cond = zero_where_empty(cond, texts)
        if self.pipe.card.vector is None:
            return cond
        assert cond.pooled is not None
        numbers = torch.tensor(sizes, dtype=torch.float32, device=cond.pooled.device)
        return replace(cond, pooled=vector_condition(cond.pooled, numbers))

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a random batch, and figures to log: the losses of each tenth of the timesteps,
        and "prior", the loss of the model's own images where these are preserved."""
        chosen, rows = self.samples.draw(draws)
        x0 = self.latents.sample(rows, draws)  # (B, C, h, w)
        texts = self.images.captions(chosen, draws, drop=self.diffusion.drop)
        cond = self.drawn_cond(texts, chosen, draws)
        loss, losses, t = draw_diffusion_loss(self.denoiser, self.diffusion, x0, cond, draws)
        figures = losses_by_timestep(losses, t, self.diffusion.timesteps, draws)
        if self.preserved is not None:
            figures["prior"] = self.prior_loss(self.preserved, draws)
            loss = loss + self.preserved.config.weight * figures["prior"]
        return loss, figures

    def prior_loss(self, preserved: ClassImages, draws: Draws) -> Tensor:
        """Return the loss of as many images that the model drew of its class before the training."""
        draws = preserved.draws(draws)
        rows = preserved.rows(draws)
        x0 = preserved.latents(rows).to(self.device)
        if self.canvases is not None:
            cond = self.pipe.text([preserved.config.prompt] * len(rows), tuple(x0.shape[-2:]), seeds=rows)
        else:
            side = float(self.images.size)
            texts = [preserved.config.prompt] * len(rows)
            cond = self.cond_of_sizes(texts, [[side, side, 0.0, 0.0, side, side]] * len(rows))
        return draw_diffusion_loss(self.denoiser, self.diffusion, x0, cond, draws).weighted

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.samples.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return the loss at fixed timesteps and noise over held-out images, or over training images."""
        chosen = self.fixed_samples()
        losses = []
        for start in range(0, len(chosen), 8):
            part = chosen[start : start + 8]
            draws, x0 = Draws(7, range(start, start + len(part))), self.latents.encode(part)
            t = self.diffusion.draw(draws).to(self.device)
            eps = draws.normal(*x0.shape).to(self.device)
            cond = self.cond(self.images.describe(part), part, draws.samples)
            losses.append(diffusion_loss(self.denoiser, x0, cond, t, eps).cpu())
        return {"loss": float(torch.cat(losses).mean())}

    def preview(self) -> np.ndarray:
        """Show samples of the captions of some images, each beside the image."""
        chosen = self.images.plain(PREVIEWED, seed=3)
        seeds = range(len(chosen))
        cond, uncond = self.cond(self.images.describe(chosen), chosen, seeds), self.uncond(chosen, seeds)
        z = sample_latents(
            self.denoiser,
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


def check_trained(train: tuple[str, ...]) -> None:
    """Raise ValueError unless different networks are named, at least one."""
    if not train or len(set(train)) < len(train):
        raise ValueError(f"train: expected different networks, got {list(train)}")


def trained_networks(pipe: LatentDiffusion, train: tuple[Trained, ...]) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by name; ValueError if it lacks one."""
    networks = pipe.networks()
    for name in train:
        if name not in networks:
            raise ValueError(f"train: {pipe.name!r} has no {name!r}; {nearest(name, networks)}")
    return {name: networks[name] for name in train}
