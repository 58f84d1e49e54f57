"""Training of the prior: from a caption to CLIP's embedding of its image, by diffusion or autoregression.

Ramesh et al. 2022, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.models.unclip.autoregressive import AutoregressiveConfig, AutoregressivePrior
from ldm.models.unclip.prior import Prior, PriorConfig
from ldm.training.caches.embeddings import (
    EmbeddingCache,
    check_embed_dim,
    embed,
    embedding_statistics,
    read_clip,
)
from ldm.training.caches.prior_embeddings import sample_prior
from ldm.training.config import RunConfig, check_at_least
from ldm.training.diffusion import DiffusionConfig
from ldm.training.draws import Draws
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import words_of
from ldm.training.losses.common import draw_diffusion_loss
from ldm.weights.formats.ldm_folder import begin_with, write_part, write_text


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """The configuration of a prior's training.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        text: Folder of CLIP's text tower, which is frozen.
        vision: Folder of CLIP's image tower, which is frozen.
        variants: Number of cached scenes that are not plain; see `CachedScenes`.
        diffusion: Schedule and timesteps; the prediction is x0. Of an autoregressive prior only `drop` is
            used.
        model: Shape of a diffusion prior; None for an autoregressive one. Default: None.
        autoregressive: Shape of an autoregressive prior; None for a diffusion prior. Default: None.
        measured: Number of embeddings that statistics or codes are fitted to, at least 8. Default: 4096.
        net: Folder of a prior to begin with, its statistics included; None to begin from scratch.
            Default: None.
    """

    run: RunConfig
    data: DataSection
    text: str
    vision: str
    variants: int
    diffusion: DiffusionConfig
    model: PriorConfig | None = None
    autoregressive: AutoregressiveConfig | None = None
    measured: int = 4096
    net: str | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.autoregressive is None):
            raise ValueError("expected one of model (a diffusion prior) and autoregressive")
        if self.diffusion.prediction != "x0":
            raise ValueError(f"diffusion.prediction: a prior predicts x0, got {self.diffusion.prediction!r}")
        check_at_least(8, measured=self.measured)
        check_at_least(0, variants=self.variants)

    @property
    def shape(self) -> PriorConfig | AutoregressiveConfig:
        """The shape of the network, of either kind."""
        shape = self.model or self.autoregressive
        assert shape is not None
        return shape


class PriorPart:
    """A prior in training."""

    def __init__(self, config: PriorTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run, validates_held_out=True)
        self.clip = read_clip(config.text, config.vision, length=config.shape.length).to(device)
        check_embed_dim("embed_dim", config.shape.embed_dim, self.clip)
        torch.manual_seed(config.run.seed)
        net = make_prior(config.shape)
        self.scenes = self.images.cached(config.run, config.variants)
        self.embeddings = EmbeddingCache.open(self.clip, self.scenes)
        draws = Draws(config.run.seed, range(config.measured), stream=1)
        measured = self.embeddings[self.scenes.draw(draws)[1]]
        if isinstance(net, AutoregressivePrior):
            net.codes.fit(measured)
        elif net.config.normalize == "statistics":
            net.clip_mean, net.clip_std = embedding_statistics(measured)
        if config.net is not None:
            begin_with(net, config.net, "prior")
        self.net = net.to(device)
        self.denoiser = (
            None if isinstance(net, AutoregressivePrior) else Denoiser(net, config.diffusion.make(), "x0")
        )
        self.model = nn.ModuleDict({"net": self.net})

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a random batch: the diffusion loss, or the cross-entropy of the codes."""
        diffusion = self.config.diffusion
        chosen, rows = self.scenes.draw(draws)
        captions = self.images.captions(chosen, draws, drop=diffusion.drop)
        image, cond = self.embeddings[rows].to(self.device), self.clip.read(captions)
        if isinstance(self.net, AutoregressivePrior):
            return draws.mean(self.net.loss(image, cond)), {}
        assert self.denoiser is not None
        x0 = self.net.normalize(image)  # (B, E)
        return draw_diffusion_loss(self.denoiser, diffusion, x0, cond, draws).weighted, {}

    def sample(
        self, captions: Sequence[str], *, seed: int = 0, steps: int = 10, guidance: float = 1.0
    ) -> Tensor:
        """Sample image embeddings of captions.

        Args:
            captions: B captions.
            seed: Seed of the first sample. Default: 0.
            steps: DDIM steps; not used by an autoregressive prior. Default: 10.
            guidance: Guidance scale; not used by an autoregressive prior. Default: 1.

        Returns:
            Embeddings, (B, E).
        """
        if isinstance(self.net, AutoregressivePrior):
            return self.net.sample(self.clip.read(captions), list(range(seed, seed + len(captions))))
        assert self.denoiser is not None
        return sample_prior(self.denoiser, self.clip, captions, seed=seed, steps=steps, guidance=guidance)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.scenes.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return mean cosines over 128 held-out images.

        Between the images' embeddings and those sampled from their captions, and between the images'
        embeddings and the captions' own.
        """
        chosen = self.images.held_out(128)
        captions = self.images.describe(chosen)
        true, made = embed(self.clip, self.images, chosen), self.sample(captions).float()
        text = self.clip.text_embedding(captions).vector
        return {
            "cosine": float(F.cosine_similarity(made, true).mean()),
            "text_cosine": float(F.cosine_similarity(text, true).mean()),
        }

    def preview(self) -> None:
        """Return None: embeddings cannot be shown."""
        return None

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the prior, with the name of its CLIP, and the text tower that it reads."""
        write_part(
            folder,
            "prior",
            self.net,
            self.net.config,
            clip=self.clip.name,
            diffusion=self.config.diffusion,
            figures=self.validate(),
            training=record,
        )
        assert self.clip.text is not None
        write_text(folder, self.clip.text, words=words_of(self.images), training=record)


def make_prior(shape: PriorConfig | AutoregressiveConfig) -> Prior | AutoregressivePrior:
    """Build a prior of either kind."""
    return Prior(shape) if isinstance(shape, PriorConfig) else AutoregressivePrior(shape)
