"""Training of CLIP: image and text towers whose embeddings of an image and its caption agree.

Radford et al. 2021, figure 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.conditioner import TextConditioner
from ldm.models.clip.towers import CLIP, CLIPConfig
from ldm.models.text.bpe import Tokenizer
from ldm.training.caches.embeddings import retrieval_figures
from ldm.training.config import RunConfig
from ldm.training.draws import Draws
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import VALIDATED, Samples, words_of
from ldm.training.losses.common import contrastive_loss
from ldm.weights.formats.ldm_folder import EMOJI_TEXT, write_part, write_text


@dataclass(frozen=True, kw_only=True)
class CLIPTraining:
    """The configuration of CLIP's training.

    The vocabulary is the set of tokens that captions use; it replaces the vocabulary of `model.text`.
    """

    run: RunConfig
    data: DataSection
    model: CLIPConfig


class CLIPPart:
    """Two towers in training."""

    def __init__(self, config: CLIPTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run)
        self.tokenizer = Tokenizer(vocabulary=caption_tokens(self.images.texts()))
        text = replace(
            config.model.text,
            vocab_size=len(self.tokenizer),
            bos_id=self.tokenizer.bos_id,
            eot_id=self.tokenizer.eot_id,
        )
        torch.manual_seed(config.run.seed)
        self.model = CLIP(replace(config.model, text=text)).to(device)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the contrastive loss of a random batch, and figures to log; see `contrastive_loss`."""
        chosen = self.images.draw(draws)
        text = self.embed_texts(self.images.captions(chosen, draws))
        image = self.embed_images(chosen)
        return contrastive_loss(draws.gather(image), draws.gather(text), self.model.logit_scale)

    def embed_images(self, chosen: Samples) -> Tensor:
        """Return embeddings of images, (B, E) float32, of length 1."""
        x = self.images.tensor(chosen).to(self.device)  # (B, 3, H, W)
        return F.normalize(self.model.encode_image((x + 1) / 2).float(), dim=-1)

    def embed_texts(self, captions: list[str]) -> Tensor:
        """Return embeddings of captions, (B, E) float32, of length 1."""
        ids = self.tokenizer(captions, context_length=None, pad=0).to(self.device)  # (B, L)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.images.draw(draws))

    def validate(self) -> dict[str, float]:
        """Return how often the nearest image of a caption is its own, over plain training images."""
        image, text = self.embed(self.images.plain(VALIDATED, seed=7))
        return {"text_to_image_top1": retrieval_figures(image, text)["text_to_image_top1"]}

    def embed(self, chosen: Samples) -> tuple[Tensor, Tensor]:
        """Return embeddings of images and of their canonical captions, each (B, E) and of length 1."""
        parts = [chosen[start : start + 128] for start in range(0, len(chosen), 128)]
        images = [self.embed_images(part) for part in parts]
        texts = [self.embed_texts(self.images.describe(part)) for part in parts]
        return torch.cat(images).cpu(), torch.cat(texts).cpu()

    def preview(self) -> None:
        """Return None: embeddings cannot be shown."""
        return None

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the towers as text.* and vision.*; vision.yaml holds the scale of their similarity."""
        write_part(
            folder,
            "vision",
            self.model.visual,
            self.model.config.vision,
            logit_scale=float(self.model.logit_scale),
            figures=self.validate(),
            training=record,
        )
        text = TextConditioner(self.model.text_tower(), self.tokenizer, EMOJI_TEXT)
        write_text(folder, text, words=words_of(self.images), training=record)


def caption_tokens(texts: Iterable[str]) -> list[int]:
    """Return the tokens of texts, sorted."""
    tokenizer = Tokenizer()
    found: set[int] = set()
    for text in texts:
        found.update(tokenizer.encode(text))
    return sorted(found)
