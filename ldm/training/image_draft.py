"""Training a draft of the latent from CLIP's image embedding, by squared error, for a decoder to begin with (see `ldm.models.draft`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data import Composition
from ldm.models.draft import Draft, DraftConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.training.config import DataConfig, RunConfig
from ldm.training.data import Pictures, picture_grid, to_uint8
from ldm.training.embeddings import EmbeddingCache, embed, read_clip
from ldm.training.imagined import Imagined
from ldm.training.latents import LatentCache
from ldm.training.loop import Draws
from ldm.training.vae import held_out_compositions
from ldm.weights.native import begin_with, read_part, write_part


@dataclass(frozen=True, kw_only=True)
class ImageDraftTraining:
    """The configuration of an image draft's training. ``vision``: the folder of CLIP's image tower, which stays as it is.

    ``jitter``: the standard deviation of noise added to embeddings, as a share of each component's own, so that what a prior makes of a caption,
    which is not quite the picture's embedding, is understood too. ``imagined``: the prior itself, whose embeddings are learnt from beside the
    pictures', its captions read by the tower in folder ``text``; ``net``: the folder of a draft to begin with. None for neither.
    """

    run: RunConfig
    data: DataConfig
    vae: str
    vision: str
    model: DraftConfig
    variants: int
    jitter: float = 0.0
    text: str | None = None
    imagined: Imagined | None = None
    net: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) != (self.imagined is None):
            raise ValueError("text and imagined: a prior reads captions by a text tower, expected both or neither")
        if not self.jitter >= 0:
            raise ValueError(f"jitter: expected at least 0, got {self.jitter}")


class ImageDraftPart:
    """An image draft in training."""

    def __init__(self, config: ImageDraftTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pictures = Pictures(config.data)
        vae, about = read_part(config.vae, "vae", VAEConfig, AutoencoderKL)
        assert isinstance(vae, AutoencoderKL)
        self.vae = vae.to(device)
        self.clip = read_clip(config.text, config.vision, length=None if config.imagined is None else config.imagined.length).to(device)
        if self.clip.width != config.model.embed_dim:
            raise ValueError(f"model.embed_dim {config.model.embed_dim}: embeddings are {self.clip.width} wide")
        latent = (vae.config.latent_channels, config.data.size // vae.config.factor)
        if (config.model.channels, config.model.size) != latent:
            raise ValueError(f"model: expected {latent[0]} channels of size {latent[1]}, got {config.model.channels} of {config.model.size}")
        torch.manual_seed(config.run.seed)
        self.net = Draft(config.model).to(device)
        if config.net is not None:
            begin_with(self.net, config.net, "draft")
        self.model: nn.Module = nn.ModuleDict({"net": self.net})
        self.cache = LatentCache.of_run(config.run, self.pictures, self.vae, about, config.variants)
        self.embeddings = EmbeddingCache.of_run(config.run, self.pictures, self.clip, config.variants, config.imagined)
        self.spread = torch.from_numpy(self.embeddings.vectors[::37].astype(np.float32)).std(0).to(device)  # (E,)

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [self.cache.choose(c, draws.rng)[1] for c in self.pictures.draw(draws.rng, batch)]
        x0 = self.cache.sample(rows, draws).to(self.device)  # (B, C, h, w)
        image = self.embeddings.draw(rows, draws.rng).to(self.device)
        image = image + self.config.jitter * self.spread * draws.normal(*image.shape).to(self.device)
        return (self.net(image) - x0).square().mean(), {}

    def validate(self) -> dict[str, float]:
        """Mean squared errors of 256 noto names on white, and of 64 pictures that training never sees."""
        index = self.pictures.data.index
        plain = [Composition(picture=int(row)) for row in np.random.default_rng(7).permutation(index.train_of["noto"])[:256]]
        sets = {"plain_mse": plain, "held_out_mse": held_out_compositions(self.pictures, 64)}
        return {name: self.error(chosen) for name, chosen in sets.items()}

    def error(self, chosen: list[Composition]) -> float:
        """The mean squared error of the drafts of compositions."""
        parts = self.pictures.tensor(chosen).to(self.device).split(32)
        latents = self.cache.scale * torch.cat([self.vae.encode(x).mean for x in parts])
        return float((self.net(embed(self.clip, self.pictures, chosen)) - latents).square().mean())

    def preview(self) -> np.ndarray:
        chosen = held_out_compositions(self.pictures, 16)
        drafts = self.vae.decode(self.net(embed(self.clip, self.pictures, chosen)) / self.cache.scale)
        return picture_grid(to_uint8(torch.stack([self.pictures.tensor(chosen), drafts.cpu()], 1).flatten(0, 1)), columns=8)

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        write_part(folder, "draft", self.net, self.config.model, clip=self.clip.name, figures=self.validate(), training=record)
