"""Training of a text tower for a frozen image tower: locked-image tuning (Zhai et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.training.caches.embeddings import EmbeddingCache, read_clip, retrieval_figures
from ldm.training.config import RunConfig, check_at_least
from ldm.training.draws import Draws
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import VALIDATED, words_of
from ldm.training.losses.common import contrastive_loss
from ldm.weights.formats.ldm_folder import read_text, write_text


@dataclass(frozen=True, kw_only=True)
class CLIPTextTraining:
    """The configuration of a text tower's training.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        text: Folder of the tower to begin with; its draft, if it has one, is not used.
        vision: Folder of the image tower; it is run once for each cached scene.
        variants: Number of cached scenes that are not plain; see `CachedScenes`.
    """

    run: RunConfig
    data: DataSection
    text: str
    vision: str
    variants: int

    def __post_init__(self) -> None:
        check_at_least(0, variants=self.variants)


class CLIPTextPart:
    """A text tower in training on fixed image embeddings."""

    def __init__(self, config: CLIPTextTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run)
        self.clip = read_clip(None, config.vision)
        self.scenes = self.images.cached(config.run, config.variants)
        self.embeddings = EmbeddingCache.open(self.clip, self.scenes)
        read = read_text(config.text)
        text = TextConditioner(read.tower, read.tokenizer, read.convention, read.known_words)
        self.text = text.to(device).requires_grad_(True)
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32, device=device))
        self.model = nn.ModuleDict({"text": self.text, "scale": nn.ParameterList([self.logit_scale])})

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the contrastive loss of a random batch, and figures to log; see `contrastive_loss`."""
        chosen, rows = self.scenes.draw(draws)
        image = F.normalize(self.embeddings[rows].to(self.device), dim=-1)
        text = self.embed_texts(self.images.captions(chosen, draws))
        return contrastive_loss(draws.gather(image), draws.gather(text), self.logit_scale)

    def embed_texts(self, captions: list[str]) -> Tensor:
        """Return embeddings of captions, (B, E) float32, of length 1."""
        pooled = self.text(captions).pooled
        assert pooled is not None
        return F.normalize(pooled.float(), dim=-1)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.scenes.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return retrieval figures (see `retrieval_figures`) of plain training images."""
        chosen = self.images.plain(VALIDATED, seed=7)
        rows, captions = self.scenes.rows_of(chosen), self.images.describe(chosen)
        text = [self.embed_texts(captions[i : i + 64]) for i in range(0, len(chosen), 64)]
        return retrieval_figures(F.normalize(self.embeddings[rows], dim=-1), torch.cat(text).cpu())

    def preview(self) -> None:
        """Return None: embeddings cannot be shown."""
        return None

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the text tower, with the name of its CLIP and the scale of their similarity."""
        write_text(
            folder,
            self.text,
            words=words_of(self.images),
            training=record,
            clip=self.clip.name,
            logit_scale=float(self.logit_scale),
            figures=self.validate(),
        )
