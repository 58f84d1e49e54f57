"""Training the prior: from a caption to CLIP's embedding of its picture, by diffusion or by components
(Ramesh et al. 2022, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data import Composition, caption
from ldm.data.captions import vocabulary
from ldm.diffusion.denoiser import Denoiser
from ldm.models.unclip.autoregressive import AutoregressiveConfig, AutoregressivePrior
from ldm.models.unclip.prior import Prior, PriorConfig
from ldm.training.config import DataConfig, RunConfig, at_least
from ldm.training.data import Pictures
from ldm.training.embeddings import EmbeddingCache, embed, embedding_statistics, read_clip
from ldm.training.imagined import imagine
from ldm.training.loop import Draws
from ldm.training.losses import diffusion_loss
from ldm.training.parts.latent_diffusion import Diffusion
from ldm.training.parts.vae import held_out_compositions
from ldm.weights.formats.ldm_folder import begin_with, write_part, write_text


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """The configuration of a prior's training: ``model`` for the diffusion prior, ``autoregressive`` for the
    other.

    ``text`` and ``vision``: folders of CLIP's towers, which stay as they are; ``variants``: see
    `Compositions`; ``measured``: embeddings that statistics and components are of; ``net``: the folder of a
    prior to begin with, statistics included, None to begin anew.
    """

    run: RunConfig
    data: DataConfig
    text: str
    vision: str
    variants: int
    diffusion: Diffusion
    model: PriorConfig | None = None
    autoregressive: AutoregressiveConfig | None = None
    measured: int = 4096
    net: str | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.autoregressive is None):
            raise ValueError("expected one of model (the diffusion prior) and autoregressive")
        if self.diffusion.prediction != "x0":
            raise ValueError(f"diffusion.prediction: a prior predicts x0, got {self.diffusion.prediction!r}")
        at_least(8, measured=self.measured)


class PriorPart:
    """A prior in training."""

    def __init__(self, config: PriorTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        shape = config.model or config.autoregressive
        assert shape is not None
        self.pictures = Pictures(config.data)
        self.clip = read_clip(config.text, config.vision, length=shape.length).to(device)
        if self.clip.width != shape.embed_dim:
            raise ValueError(
                f"embed_dim {shape.embed_dim}: the embeddings of {self.clip.name!r} are {self.clip.width}"
                " wide"
            )
        torch.manual_seed(config.run.seed)
        net: Prior | AutoregressivePrior = (
            Prior(config.model) if config.model is not None else AutoregressivePrior(config.autoregressive)
        )  # type: ignore[arg-type]
        self.embeddings = EmbeddingCache.of_run(config.run, self.pictures, self.clip, config.variants)
        draws = Draws(config.run.seed, 0, stream=1)
        seen = self.embeddings[
            [self.embeddings.choose(c, draws.rng)[1] for c in self.pictures.draw(draws.rng, config.measured)]
        ]
        if isinstance(net, AutoregressivePrior):
            net.codes.fit(seen)
        elif net.config.normalize == "statistics":
            net.clip_mean, net.clip_std = embedding_statistics(seen)
        if config.net is not None:
            begin_with(net, config.net, "prior")
        self.net = net.to(device)
        self.denoiser = (
            None if isinstance(net, AutoregressivePrior) else Denoiser(net, config.diffusion.make(), "x0")
        )
        self.model = nn.ModuleDict({"net": self.net})

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        drop = self.config.diffusion.drop
        chosen = [self.embeddings.choose(c, draws.rng) for c in self.pictures.draw(draws.rng, batch)]
        captions = [
            "" if draws.rng.random() < drop else caption(c, self.pictures.data.index, draws.rng)
            for c, _ in chosen
        ]
        image, cond = self.embeddings[[row for _, row in chosen]].to(self.device), self.clip.read(captions)
        if self.denoiser is None:
            assert isinstance(self.net, AutoregressivePrior)
            return self.net.loss(image, cond).mean(), {}
        assert isinstance(self.net, Prior)
        t = self.config.diffusion.draw(batch, draws.torch).to(self.device)
        x0, eps = self.net.normalize(image), draws.normal(*image.shape).to(self.device)
        losses = diffusion_loss(self.denoiser, x0, cond, t, eps)
        weight = self.config.diffusion.weight(self.denoiser.schedule.snr(t)).to(losses)
        return (weight * losses).mean(), {}

    def imagine(
        self, captions: Sequence[str], *, seed: int = 0, steps: int = 10, guidance: float = 1.0
    ) -> Tensor:
        """Image embeddings (B, E) of captions."""
        if self.denoiser is None:
            assert isinstance(self.net, AutoregressivePrior)
            return self.net.sample(self.clip.read(captions), list(range(seed, seed + len(captions))))
        return imagine(self.denoiser, self.clip, captions, seed=seed, steps=steps, guidance=guidance)

    def validate(self) -> dict[str, float]:
        """Of 128 pictures that training never sees: the cosine of their embeddings and those made of their
        captions, and of the captions' own."""
        chosen = held_out_compositions(self.pictures, 128)
        return self.cosines(chosen)

    def cosines(self, chosen: list[Composition]) -> dict[str, float]:
        captions = [caption(c, self.pictures.data.index) for c in chosen]
        true, made = embed(self.clip, self.pictures, chosen), self.imagine(captions).float()
        text = self.clip.text_embedding(captions).vector
        return {
            "cosine": float(F.cosine_similarity(made, true).mean()),
            "text_cosine": float(F.cosine_similarity(text, true).mean()),
        }

    def preview(self) -> np.ndarray | None:
        return None

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        facts = {
            "clip": self.clip.name,
            "diffusion": self.config.diffusion,
            "figures": self.validate(),
            "training": record,
        }
        write_part(folder, "prior", self.net, self.net.config, **facts)
        assert self.clip.text is not None
        write_text(folder, self.clip.text, words=vocabulary(self.pictures.data.index), training=record)
