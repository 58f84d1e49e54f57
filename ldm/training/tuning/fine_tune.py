"""Fine-tuning of a model that `ldm.load` reads: its UNet, its text towers, the decoder of its autoencoder.

With `prior`, it is DreamBooth (Ruiz et al. 2022, arXiv:2208.12242). The export is a whole model, which
`ldm.load(weights=...)` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.diffusion.cond import Cond
from ldm.models.labels import LabelConditioner
from ldm.pipelines.latent import LatentDiffusion
from ldm.registry.saving import save
from ldm.training.adapters.class_images import PriorPreservation
from ldm.training.caches.texts import CachedTexts
from ldm.training.config import RunConfig
from ldm.training.draws import Draws
from ldm.training.inputs.files import files_only
from ldm.training.inputs.opening import DataSection
from ldm.training.parts.vae import VAELoss
from ldm.training.recomputing import recompute_blocks
from ldm.training.tuning.base_model import check_base
from ldm.training.tuning.fine_tune_decoder import FIXED_IMAGES, Decoding
from ldm.training.tuning.tuned_model import FineTuneDiffusion, Trained, TunedModel, check_trained

DECODER: Literal["vae_decoder"] = "vae_decoder"


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The configuration of a fine-tuning.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        base: Name of the model (see `ldm.list_models`); None for that of the folder `weights`.
        weights: Its weights, as `ldm.load` takes them; None for the model's own. Default: None.
        train: What is trained: "unet", "text", SDXL's "text2", "class" (the embeddings of classes), and
            "vae_decoder", the decoder of the autoencoder, whose encoder stays. Default: the UNet.
        diffusion: Changes of the diffusion, and the weights of the loss.
        prior: Images of the model itself that it keeps drawing; None for none. Default: None.
        reconstruction: Weights of the loss of the autoencoder's decoder, which is added to that of the
            diffusion; its `kl` is not read. Default: as in `VAELoss`.
        recompute: Whether blocks compute their activations again in the backward pass, which takes less
            memory and more time. Default: False.
        cached_texts: Whether the states of captions are computed once and kept on the disk, in half
            precision. Default: False.
    """

    run: RunConfig
    data: DataSection
    base: str | None = None
    weights: str | None = None
    train: tuple[Literal["unet", "text", "text2", "class", "vae_decoder"], ...] = ("unet",)
    diffusion: FineTuneDiffusion = field(default_factory=FineTuneDiffusion)
    prior: PriorPreservation | None = None
    reconstruction: VAELoss = field(default_factory=VAELoss)
    recompute: bool = False
    cached_texts: bool = False

    def __post_init__(self) -> None:
        check_base(self.base, self.weights)
        if self.cached_texts and {"text", "text2"} & set(self.train):
            raise ValueError("cached_texts: expected false for a text tower that is trained")
        if self.cached_texts and self.prior is not None:
            raise ValueError("cached_texts: expected false with prior, whose prompt is no caption")
        check_trained(self.train)

    @property
    def networks(self) -> tuple[Trained, ...]:
        """The trained networks beside the autoencoder's decoder."""
        return tuple(name for name in self.train if name != DECODER)


class FineTunePart(TunedModel):
    """A loaded model in training."""

    def __init__(self, config: FineTuning, device: torch.device) -> None:
        self.config = config
        super().__init__(config, device, config.networks)
        self.decoding: Decoding | None = None
        trained = dict(self.trained)
        if DECODER in config.train:
            self.decoding = Decoding(self.pipe, self.images, config.reconstruction)
            trained[DECODER] = self.decoding.trained
        self.model = nn.ModuleDict({name: trained[name] for name in config.train}).requires_grad_(True)
        if config.recompute:
            recompute_blocks(self.model)
        self.states = self.read_texts() if config.cached_texts else None

    def check(self, pipe: LatentDiffusion) -> None:
        """Raise ValueError for a model whose texts cannot be kept."""
        if self.config.cached_texts and isinstance(pipe.text, ExemplarConditioner):
            raise ValueError(
                f"cached_texts: expected false, as {pipe.name!r} is shown exemplars beside its text"
            )
        if self.config.cached_texts and isinstance(pipe.text, LabelConditioner):
            raise ValueError(f"cached_texts: expected false, as {pipe.name!r} reads classes")

    def read_texts(self) -> CachedTexts:
        """Return the states of all captions, after computing those that no file holds."""
        text, images = self.pipe.text, files_only(self.images, "cached_texts")
        if text is None:
            raise ValueError(f"cached_texts: {self.pipe.name!r} reads no text")
        key = {name: self.base_hashes[name] for name in text.networks()}
        captions = {*images.texts(), *images.describe(images.held_out(FIXED_IMAGES))}
        return CachedTexts(text, f"{key}/{self.pipe.card.text}/{self.pipe.card.text2}", captions)

    def read(self, texts: Sequence[str]) -> Cond:
        """Return the condition of texts, from the files where the states are kept."""
        return super().read(texts) if self.states is None else self.states(texts)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a random batch, with that of the decoder, and figures to log."""
        loss, figures = super().loss(draws)
        if self.decoding is None:
            return loss, figures
        added, errors = self.decoding.loss_of(draws)
        return loss + added, {**figures, "loss_diffusion": loss, **errors}

    def validate(self) -> dict[str, float]:
        """Return the loss at fixed timesteps and noise, and figures of the decoder; see `TunedModel`."""
        found = super().validate()
        return found if self.decoding is None else {**found, **self.decoding.validate()}

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the whole model, with half precision, and the number of each class where it reads classes."""
        facts: dict[str, Any] = {} if self.classes is None else {"class_numbers": self.classes.named}
        save(self.pipe, folder, dtype="float16", training=record, figures=self.validate(), **facts)
