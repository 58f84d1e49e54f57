"""CLIP's embeddings of scenes and captions, for the networks of unCLIP in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning.clip import ClipPair
from ldm.conditioning.conditioner import TextConditioner
from ldm.models.clip.towers import VisionConfig, VisionTower
from ldm.training.caches.prior_embeddings import PriorEmbeddings
from ldm.training.draws import Draws
from ldm.training.inputs.protocol import CachedSamples, Rows, Samples, TrainingImages
from ldm.weights.formats.ldm_folder import EMOJI_TEXT, about_part, read_part, read_text


def read_clip(text: str | Path | None, vision: str | Path, *, length: int | None = None) -> ClipPair:
    """Read the frozen CLIP of two folders; its name holds the hash of its image tower.

    Args:
        text: Folder of the text tower; None for the image tower alone.
        vision: Folder of the image tower.
        length: Number of tokens that texts are padded to; None for the longest of a batch. Default: None.
    """
    tower, _ = read_part(vision, "vision", VisionConfig, VisionTower)
    assert isinstance(tower, VisionTower)
    conditioner = None
    if text is not None:
        read = read_text(text)
        conditioner = TextConditioner(
            read.tower, read.tokenizer, replace(EMOJI_TEXT, length=length), read.known_words
        )
    return ClipPair(clip_name(vision), text=conditioner, vision=tower).eval().requires_grad_(False)


def clip_name(vision: str | Path) -> str:
    """Return the name of a CLIP trained here, which holds the hash of the image tower in a folder."""
    return f"emoji-clip/{about_part(vision, 'vision')['sha256'][:12]}"


def check_embed_dim(key: str, embed_dim: int, clip: ClipPair, *, embeddings: int = 1) -> None:
    """Raise ValueError unless a configured width is that of a CLIP's embeddings.

    Args:
        key: The configuration's key, which the message names.
        embed_dim: The configured width.
        clip: The CLIP.
        embeddings: Number of embeddings that are joined. Default: 1.
    """
    if embed_dim != embeddings * clip.width:
        raise ValueError(
            f"{key} {embed_dim}: the embeddings of {clip.name!r} are {embeddings * clip.width} wide"
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddingCache:
    """The image embeddings of all cached samples.

    Args:
        vectors: The images' own embeddings, (N, E) float16, memory-mapped.
        from_prior: Embeddings that a prior samples from a caption of each, (N, E), or None. Default: None.
        share: Share of embeddings that `draw` takes from the prior. Default: 0.
    """

    vectors: Rows
    from_prior: Rows | None = None
    share: float = 0.0

    @classmethod
    def open(
        cls, clip: ClipPair, samples: CachedSamples, prior: PriorEmbeddings | None = None
    ) -> EmbeddingCache:
        """Open the cached embeddings, after computing them if they are absent.

        Args:
            clip: The CLIP; it also reads the captions for the prior.
            samples: The cached samples of the run.
            prior: Where a share of the embeddings comes from; None for images alone. Default: None.
        """
        images, shape = samples.images, (clip.width,)
        vectors = samples.cached("embeddings", clip.name, shape, lambda part: embed(clip, images, part))
        if prior is None:
            return cls(vectors=vectors)
        sample = prior.sampler(clip)
        from_prior = samples.cached(
            "embeddings",
            prior.key,
            shape,
            lambda part: sample(images.wordings(part, samples.seed)),
        )
        return cls(vectors=vectors, from_prior=from_prior, share=prior.share)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Return the images' own embeddings of rows, (B, E) float32."""
        return torch.from_numpy(self.vectors[np.asarray(rows)]).float()

    def draw(self, rows: Sequence[int], draws: Draws) -> Tensor:
        """Return embeddings of rows, (B, E) float32, each from the prior with probability `share`."""
        own = self[rows]
        if self.from_prior is None:
            return own
        chosen = torch.from_numpy(draws.random() < self.share)
        return torch.where(chosen[:, None], torch.from_numpy(self.from_prior[np.asarray(rows)]).float(), own)


@torch.no_grad()
def embed(clip: ClipPair, images: TrainingImages, samples: Samples, *, batch: int = 64) -> Tensor:
    """Compute the image embeddings of samples, not normalised.

    Args:
        clip: The CLIP.
        images: The training images.
        samples: B samples.
        batch: Samples per call of the image tower. Default: 64.

    Returns:
        Embeddings, (B, E) float32.
    """
    parts = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    return torch.cat(
        [clip.image_embedding(((images.tensor(part) + 1) / 2).clamp(0, 1)).vector for part in parts]
    )


def embedding_statistics(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (1, E) of embeddings (N, E).

    A component's standard deviation is at least a thousandth of the components' mean one.
    """
    mean, std = embeddings.mean(0, keepdim=True), embeddings.std(0, keepdim=True)
    return mean, std.clamp_min(1e-3 * float(std.mean()) + 1e-8)


def retrieval_figures(image: Tensor, text: Tensor) -> dict[str, float]:
    """Compare embeddings of images with those of their captions, each (N, E) and of length 1.

    Returns:
        How often the nearest image of a caption is its own, and the mean cosine of the pairs.
    """
    similarity = text @ image.T
    hits = similarity.argmax(1) == torch.arange(len(image), device=similarity.device)
    return {"text_to_image_top1": float(hits.float().mean()), "cosine": float(similarity.diagonal().mean())}
