"""Training CLIP: image and text towers whose embeddings of a picture and its caption agree (Radford et al.
2021, figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.conditioner import TextConditioner
from ldm.data import Composition, caption
from ldm.data.captions import vocabulary
from ldm.models.clip.towers import CLIP, CLIPConfig
from ldm.models.text.bpe import Tokenizer
from ldm.training.config import DataConfig, RunConfig
from ldm.training.data import Pictures
from ldm.training.loop import Draws
from ldm.weights.formats.ldm_folder import EMOJI_TEXT, write_part, write_text


@dataclass(frozen=True, kw_only=True)
class CLIPTraining:
    """The configuration of CLIP's training; the vocabulary's size, and so the embedding's, is that of the
    tokens that captions use."""

    run: RunConfig
    data: DataConfig
    model: CLIPConfig


class CLIPPart:
    """Two towers in training."""

    def __init__(self, config: CLIPTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pictures = Pictures(config.data)
        self.tokenizer = Tokenizer(vocabulary=caption_tokens(self.pictures))
        text = replace(
            config.model.text,
            vocab_size=len(self.tokenizer),
            bos_id=self.tokenizer.bos_id,
            eot_id=self.tokenizer.eot_id,
        )
        torch.manual_seed(config.run.seed)
        self.model = CLIP(replace(config.model, text=text)).to(device)

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        from open_clip.loss import ClipLoss

        index = self.pictures.data.index
        chosen = self.pictures.draw(draws.rng, batch)
        ids = self.tokenizer([caption(c, index, draws.rng) for c in chosen], context_length=None, pad=0).to(
            self.device
        )
        x = self.pictures.tensor(chosen).to(self.device)
        image = F.normalize(self.model.encode_image((x + 1) / 2).float(), dim=-1)
        text = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        scale = self.model.logit_scale.float().clamp(max=np.log(100.0)).exp()
        loss = ClipLoss()(image, text, scale)
        hit = ((text @ image.T).argmax(1) == torch.arange(batch, device=self.device)).float().mean()
        return loss, {"accuracy": hit, "scale": scale}

    def validate(self) -> dict[str, float]:
        """Of all noto names that training sees, how often the caption's nearest picture (all of them on
        white) is its own."""
        index = self.pictures.data.index
        rows = index.train_of["noto"]
        chosen = [Composition(image=int(row)) for row in rows]
        image, text = self.embed(chosen)
        hits = (text @ image.T).argmax(1) == torch.arange(len(rows))
        return {"text_to_image_top1": float(hits.float().mean())}

    def embed(self, chosen: list[Composition]) -> tuple[Tensor, Tensor]:
        """Normalised image and text embeddings of compositions and their canonical captions, each (B, E)."""
        index, images, texts = self.pictures.data.index, [], []
        for start in range(0, len(chosen), 128):
            part = chosen[start : start + 128]
            ids = self.tokenizer([caption(c, index) for c in part], context_length=None, pad=0).to(
                self.device
            )
            images.append(
                F.normalize(
                    self.model.encode_image((self.pictures.tensor(part).to(self.device) + 1) / 2), dim=-1
                )
            )
            texts.append(F.normalize(self.model.encode_text(ids), dim=-1))
        return torch.cat(images).float().cpu(), torch.cat(texts).float().cpu()

    def preview(self) -> None:
        return None

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write the two towers as text.* and vision.*; the scale of their similarity stands among vision's
        facts."""
        facts = {"logit_scale": float(self.model.logit_scale), "figures": self.validate(), "training": record}
        write_part(folder, "vision", self.model.visual, self.model.config.vision, **facts)
        text = TextConditioner(self.model.text_tower(), self.tokenizer, EMOJI_TEXT)
        write_text(folder, text, words=vocabulary(self.pictures.data.index), training=record)


def caption_tokens(pictures: Pictures) -> list[int]:
    """The tokens that the words of captions can become, sorted."""
    tokenizer, found = Tokenizer(), set()
    for word in vocabulary(pictures.data.index):
        found.update(tokenizer.encode(word))
    index = pictures.data.index  # punctuation and joined words give tokens of their own
    for i in index.train:
        for noun in (index[i].phrase, index[i].label or "", *index.caption_tags[i]):
            found.update(tokenizer.encode(noun))
    return sorted(found)
