"""Training a text tower for an image tower that stays as it is: locked-image tuning (Zhai et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.data import Composition, caption
from ldm.data.captions import vocabulary
from ldm.training.config import DataConfig, RunConfig
from ldm.training.data import Pictures
from ldm.training.embeddings import EmbeddingCache, read_clip
from ldm.training.loop import Draws
from ldm.weights.formats.ldm_folder import read_text, write_text


@dataclass(frozen=True, kw_only=True)
class CLIPTextTraining:
    """The configuration of a text tower's training. ``text``: the folder of the tower to begin with, whose
    draft is left behind; ``vision``: that of the image tower, which is asked only once for each composition;
    ``variants``: see `Compositions`.
    """

    run: RunConfig
    data: DataConfig
    text: str
    vision: str
    variants: int


class CLIPTextPart:
    """A text tower in training under fixed image embeddings."""

    def __init__(self, config: CLIPTextTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pictures = Pictures(config.data)
        self.clip = read_clip(None, config.vision)
        self.embeddings = EmbeddingCache.of_run(config.run, self.pictures, self.clip, config.variants)
        read = read_text(config.text)
        self.text = (
            TextConditioner(read.tower, read.tokenizer, read.convention, read.words)
            .to(device)
            .requires_grad_(True)
        )
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32, device=device))
        self.model = nn.ModuleDict({"text": self.text, "scale": nn.ParameterList([self.logit_scale])})

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        from open_clip.loss import ClipLoss

        chosen = [self.embeddings.choose(c, draws.rng) for c in self.pictures.draw(draws.rng, batch)]
        image = F.normalize(self.embeddings[[row for _, row in chosen]].to(self.device), dim=-1)
        text = self.read([caption(c, self.pictures.data.index, draws.rng) for c, _ in chosen])
        scale = self.logit_scale.clamp(max=np.log(100.0)).exp()
        hit = ((text @ image.T).argmax(1) == torch.arange(batch, device=self.device)).float().mean()
        return ClipLoss()(image, text, scale), {"accuracy": hit, "scale": scale}

    def read(self, captions: list[str]) -> Tensor:
        """Embeddings (B, E) of captions, at length 1."""
        pooled = self.text(captions).pooled
        assert pooled is not None
        return F.normalize(pooled.float(), dim=-1)

    def validate(self) -> dict[str, float]:
        """Of all noto names that training sees, how often the caption's nearest picture (all of them on
        white) is its own, and their mean cosine."""
        index = self.pictures.data.index
        chosen = [Composition(image=int(row)) for row in index.train_of["noto"]]
        image = F.normalize(
            self.embeddings[[self.embeddings.choose(c, np.random.default_rng(0))[1] for c in chosen]], dim=-1
        )
        text = torch.cat(
            [self.read([caption(c, index) for c in chosen[i : i + 64]]) for i in range(0, len(chosen), 64)]
        ).cpu()
        similar = text @ image.T
        hits = similar.argmax(1) == torch.arange(len(chosen))
        return {"text_to_image_top1": float(hits.float().mean()), "cosine": float(similar.diagonal().mean())}

    def preview(self) -> None:
        return None

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        facts = {"clip": self.clip.name, "logit_scale": float(self.logit_scale), "figures": self.validate()}
        write_text(folder, self.text, words=vocabulary(self.pictures.data.index), training=record, **facts)
