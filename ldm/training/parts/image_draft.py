"""Training a draft of the latent from CLIP's embeddings, by squared error, for a decoder to begin with (see
`ldm.models.draft`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data import Composition, caption
from ldm.models.draft import Draft, DraftConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.training.config import DataConfig, RunConfig, at_least, share
from ldm.training.data import Pictures, picture_grid, to_uint8
from ldm.training.embeddings import EmbeddingCache, caption_embeddings, embed, read_clip
from ldm.training.imagined import Imagined
from ldm.training.latents import LatentCache
from ldm.training.loop import Draws
from ldm.training.parts.vae import held_out_compositions
from ldm.weights.formats.ldm_folder import begin_with, read_part, write_part


@dataclass(frozen=True, kw_only=True)
class ImageDraftTraining:
    """The configuration of an image draft's training. ``vision``: the folder of CLIP's image tower, ``text``:
    that of its text tower, which stay as they are.

    ``reads_text``: whether the draft reads the text's embedding behind the image's, which is that of no text
    in a share ``drop`` of the samples. ``jitter``: the standard deviation of noise added to image embeddings,
    as a share of each component's own. ``whitened``: see `whiten`. ``imagined``: a prior whose embeddings of
    captions are learnt from beside the pictures' own; ``net``: the folder of a draft to begin with. None for
    neither.
    """

    run: RunConfig
    data: DataConfig
    vae: str
    vision: str
    model: DraftConfig
    variants: int
    text: str | None = None
    reads_text: bool = False
    drop: float = 0.3
    jitter: float = 0.0
    whitened: bool = False
    imagined: Imagined | None = None
    net: str | None = None

    def __post_init__(self) -> None:
        if (self.text is not None) != (self.imagined is not None or self.reads_text):
            raise ValueError(
                "text: the folder of a tower where a prior (imagined) or the draft (reads_text) reads"
                f" captions, else None; got {self.text!r}"
            )
        share(drop=self.drop)
        at_least(0, jitter=self.jitter)
        if self.whitened and self.net is not None:
            raise ValueError(f"whitened: expected false for a draft that begins as the one in {self.net!r}")


class ImageDraftPart:
    """An image draft in training."""

    def __init__(self, config: ImageDraftTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pictures = Pictures(config.data)
        vae, about = read_part(config.vae, "vae", VAEConfig, AutoencoderKL)
        assert isinstance(vae, AutoencoderKL)
        self.vae = vae.to(device)
        self.clip = read_clip(
            config.text, config.vision, length=None if config.imagined is None else config.imagined.length
        ).to(device)
        read = self.clip.width * (2 if config.reads_text else 1)
        if read != config.model.embed_dim:
            raise ValueError(f"model.embed_dim {config.model.embed_dim}: embeddings are {read} wide")
        latent = (vae.config.latent_channels, config.data.size // vae.config.factor)
        if (config.model.channels, config.model.size) != latent:
            raise ValueError(
                f"model: expected {latent[0]} channels of size {latent[1]}, got {config.model.channels} of"
                f" {config.model.size}"
            )
        self.cache = LatentCache.of_run(config.run, self.pictures, self.vae, about, config.variants)
        self.embeddings = EmbeddingCache.of_run(
            config.run, self.pictures, self.clip, config.variants, config.imagined
        )
        # (E,)
        self.spread = torch.from_numpy(self.embeddings.vectors[::37].astype(np.float32)).std(0).to(device)
        self.captions: np.ndarray | None = None
        if config.text is not None and config.reads_text:
            self.captions = caption_embeddings(
                config.run, self.pictures, self.clip, config.variants, config.text
            )
            self.no_text = self.clip.text_embedding([""]).vector.cpu()
        torch.manual_seed(config.run.seed)
        self.net = Draft(config.model).to(device)
        if config.net is not None:
            begin_with(self.net, config.net, "draft")
        elif config.whitened:
            whiten(
                self.net,
                self.embedding(
                    range(0, len(self.embeddings.vectors), 7), Draws(config.run.seed, 0, stream=1)
                ),
            )
        self.model: nn.Module = nn.ModuleDict({"net": self.net})

    def embedding(self, rows: list[int] | range, draws: Draws) -> Tensor:
        """What the draft reads (B, E) of kept compositions."""
        image = self.embeddings.draw(rows, draws.rng).to(self.device)
        if self.config.jitter > 0:
            image = image + self.config.jitter * self.spread * draws.normal(*image.shape).to(self.device)
        if self.captions is None:
            return image
        text = torch.from_numpy(
            self.captions[np.asarray(rows), draws.rng.integers(2, size=len(rows))]
        ).float()
        told = torch.from_numpy(draws.rng.random(len(rows)) >= self.config.drop)
        return torch.cat([image, torch.where(told[:, None], text, self.no_text).to(self.device)], dim=1)

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [self.cache.choose(c, draws.rng)[1] for c in self.pictures.draw(draws.rng, batch)]
        x0 = self.cache.sample(rows, draws).to(self.device)  # (B, C, h, w)
        return (self.net(self.embedding(rows, draws)) - x0).square().mean(), {}

    def validate(self) -> dict[str, float]:
        """Mean squared errors of 256 noto names on white, of as many on grounds, and of 64 pictures that
        training never sees."""
        rows = np.random.default_rng(7).permutation(self.pictures.data.index.train_of["noto"])[:256]
        plain = [Composition(image=int(row)) for row in rows]
        grounds = list(self.pictures.palette)
        on_ground = [
            Composition(image=int(row), background=grounds[i % len(grounds)]) for i, row in enumerate(rows)
        ]
        sets = {
            "plain_mse": plain,
            "ground_mse": on_ground,
            "held_out_mse": held_out_compositions(self.pictures, 64),
        }
        return {name: self.error(chosen) for name, chosen in sets.items()}

    def error(self, chosen: list[Composition]) -> float:
        """The mean squared error of the drafts of compositions."""
        parts = self.pictures.tensor(chosen).to(self.device).split(32)
        latents = self.cache.scale * torch.cat([self.vae.encode(x).mean for x in parts])
        return float((self.drafts(chosen) - latents).square().mean())

    def drafts(self, chosen: list[Composition]) -> Tensor:
        """The drafts (B, C, h, w) of compositions, by the embeddings of their pictures and of their plain
        captions."""
        read = embed(self.clip, self.pictures, chosen)
        if self.captions is not None:
            text = self.clip.text_embedding([caption(c, self.pictures.data.index) for c in chosen]).vector
            read = torch.cat([read, text], dim=1)
        return self.net(read)

    def preview(self) -> np.ndarray:
        chosen = held_out_compositions(self.pictures, 16)
        drafts = self.vae.decode(self.drafts(chosen) / self.cache.scale)
        return picture_grid(
            to_uint8(torch.stack([self.pictures.tensor(chosen), drafts.cpu()], 1).flatten(0, 1)), columns=8
        )

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        write_part(
            folder,
            "draft",
            self.net,
            self.config.model,
            clip=self.clip.name,
            figures=self.validate(),
            training=record,
        )


@torch.no_grad()
def whiten(net: Draft, embeddings: Tensor) -> None:
    """Begin a draft so that its first layer's outputs over embeddings (N, E) are white and normal, and the
    others' as large (He et al. 2015).

    CLIP's embeddings differ most in a few directions, and pictures of one kind in the others, by a hundredth
    of the variance: a first layer that begins blind to these takes long to see them.
    """
    mean, covariance = embeddings.mean(0), torch.cov(embeddings.T)
    values, vectors = torch.linalg.eigh(covariance)
    white = vectors * values.clamp_min(1e-4 * values[-1]).rsqrt() @ vectors.T  # ZCA
    white /= (white @ covariance @ white).diagonal().mean().sqrt()
    net.fc1.weight.copy_(torch.randn_like(net.fc1.weight) / net.fc1.in_features**0.5 @ white)
    net.fc1.bias.copy_(-net.fc1.weight @ mean)
    for layer in net.hidden:
        assert isinstance(layer, nn.Linear)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    nn.init.normal_(net.fc2.weight, std=0.5 * net.fc2.in_features**-0.5)
    nn.init.zeros_(net.fc2.bias)
