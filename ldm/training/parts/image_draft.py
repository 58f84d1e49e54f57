"""Training of a draft of the latent from CLIP's embeddings, by squared error, for a decoder to begin with.

See `ldm.models.draft`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data import PALETTE
from ldm.models.draft import Draft, DraftConfig
from ldm.training.caches.embeddings import (
    EmbeddingCache,
    caption_embeddings,
    check_embed_dim,
    embed,
    read_clip,
)
from ldm.training.caches.latents import LatentSpace, check_draft_shape, read_latent_shape
from ldm.training.caches.prior_embeddings import PriorEmbeddings
from ldm.training.config import RunConfig, check_at_least, check_fraction
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.emoji import EmojiImages
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import Rows, Samples
from ldm.weights.formats.ldm_folder import begin_with, write_part


@dataclass(frozen=True, kw_only=True)
class ImageDraftTraining:
    """The configuration of an image draft's training.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        vae: Folder of the autoencoder.
        vision: Folder of CLIP's image tower, which is frozen.
        model: Shape of the draft.
        variants: Number of cached scenes that are not plain; see `CachedScenes`.
        text: Folder of CLIP's text tower, which is frozen; None if nothing reads captions. Default: None.
        reads_text: Whether the draft reads the text embedding after the image embedding. Default: False.
        drop: Share of text embeddings replaced by that of the empty caption. Default: 0.3.
        jitter: Standard deviation of noise added to image embeddings, as a share of each component's
            standard deviation. Default: 0.
        whitened: Whether the draft is initialised by `whiten`. Default: False.
        from_prior: A prior that makes a share of the embeddings; None for images alone. Default: None.
        net: Folder of a draft to begin with; None to begin from scratch. Default: None.
    """

    run: RunConfig
    data: DataSection
    vae: str
    vision: str
    model: DraftConfig
    variants: int
    text: str | None = None
    reads_text: bool = False
    drop: float = 0.3
    jitter: float = 0.0
    whitened: bool = False
    from_prior: PriorEmbeddings | None = None
    net: str | None = None

    def __post_init__(self) -> None:
        if (self.text is not None) != (self.from_prior is not None or self.reads_text):
            raise ValueError(
                "text: expected the folder of a text tower if a prior (from_prior) or the draft (reads_text)"
                f" reads captions, else None; got {self.text!r}"
            )
        check_fraction(drop=self.drop)
        check_at_least(0, jitter=self.jitter, variants=self.variants)
        if self.whitened and self.net is not None:
            raise ValueError(f"whitened: expected false for a draft that begins with the one in {self.net!r}")


class ImageDraftPart:
    """An image draft in training."""

    def __init__(self, config: ImageDraftTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run, validates_held_out=True)
        length = None if config.from_prior is None else config.from_prior.length
        self.clip = read_clip(config.text, config.vision, length=length).to(device)
        check_embed_dim(
            "model.embed_dim", config.model.embed_dim, self.clip, embeddings=2 if config.reads_text else 1
        )
        check_draft_shape(config.model, read_latent_shape(config.vae, self.images))
        self.scenes = self.images.cached(config.run, config.variants)
        self.latents = LatentSpace.open(config.vae, self.scenes, device)
        self.embeddings = EmbeddingCache.open(self.clip, self.scenes, config.from_prior)
        vectors = self.embeddings.vectors
        if len(vectors) == 1 and config.jitter > 0:
            raise ValueError(f"jitter {config.jitter}: expected 0, as one image has no standard deviation")
        measured = vectors[:: max(1, min(37, len(vectors) // 100))].astype(np.float32)
        self.spread = torch.from_numpy(measured).std(0).to(device)  # (E,)
        self.captions: Rows | None = None
        if config.text is not None and config.reads_text:
            self.captions = caption_embeddings(self.clip, config.text, self.scenes)
            self.no_text = self.clip.text_embedding([""]).vector.cpu()
        torch.manual_seed(config.run.seed)
        self.net = Draft(config.model).to(device)
        if config.net is not None:
            begin_with(self.net, config.net, "draft")
        elif config.whitened:
            rows = range(0, len(vectors), 7)
            draws = Draws(config.run.seed, range(len(rows)), stream=1)
            whiten(self.net, self.read_embeddings(rows, draws))
        self.model = nn.ModuleDict({"net": self.net})

    def read_embeddings(self, rows: Sequence[int], draws: Draws) -> Tensor:
        """Return the draft's inputs of cached scenes, (B, E) or (B, 2E)."""
        image = self.embeddings.draw(rows, draws).to(self.device)
        if self.config.jitter > 0:
            image = image + self.config.jitter * self.spread * draws.normal(*image.shape).to(self.device)
        if self.captions is None:
            return image
        version = draws.integers(2)  # canonical or random caption
        text = torch.from_numpy(self.captions[np.asarray(rows), version]).float()
        kept = torch.from_numpy(draws.random() >= self.config.drop)
        return torch.cat([image, torch.where(kept[:, None], text, self.no_text).to(self.device)], dim=1)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the drafts of a random batch."""
        _, rows = self.scenes.draw(draws)
        x0 = self.latents.sample(rows, draws)  # (B, C, h, w)
        return draws.mean((self.net(self.read_embeddings(rows, draws)) - x0).square()), {}

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.scenes.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return mean squared errors of drafts from canonical captions.

        Over 256 training images, 64 held-out images, and of the emoji the training images on backgrounds.
        """
        plain = self.images.plain(256, seed=7)
        sets = {"plain_mse": plain, "held_out_mse": self.images.held_out(64)}
        if isinstance(self.images, EmojiImages):
            sets["background_mse"] = self.images.on_backgrounds(plain, list(PALETTE))
        return {name: self.error(chosen) for name, chosen in sets.items()}

    def error(self, chosen: Samples) -> float:
        """Return the mean squared error of the drafts of scenes."""
        latents = self.latents.encode(chosen)
        return float((self.drafts(chosen) - latents).square().mean())

    def drafts(self, chosen: Samples) -> Tensor:
        """Return drafts from the embeddings of images and of their canonical captions, (B, C, h, w)."""
        read = embed(self.clip, self.images, chosen)  # (B, E)
        if self.captions is not None:
            text = self.clip.text_embedding(self.images.describe(chosen)).vector
            read = torch.cat([read, text], dim=1)  # (B, 2E)
        return self.net(read)

    def preview(self) -> np.ndarray:
        """Show held-out images, each with its draft."""
        chosen = self.images.held_out(16)
        drafts = self.latents.decode(self.drafts(chosen))
        return comparison_grid(self.images.tensor(chosen), drafts, columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the draft, with the name of its CLIP."""
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
    """Initialise a draft so that the outputs of its first layer are white over embeddings (N, E).

    The other layers keep their inputs' variance (He et al. 2015). CLIP's embeddings differ most in a few
    directions, and images of one kind differ in the others, by a hundredth of the variance: a first layer
    that is initialised without regard to this needs long to use them.
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
