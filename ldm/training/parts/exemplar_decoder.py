"""Training of a decoder that is shown exemplars: latents conditioned on CLIP's embedding of their own image.

The decoder begins with a diffusion transformer that was trained with exemplars, and learns to read the
embedding: what the caption does not state, such as the background, is in it (Ramesh et al. 2022, section 2.1,
with the retrieval of Blattmann et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.clip import ClipPair
from ldm.conditioning.exemplar_index import ExemplarIndex, SceneMetric
from ldm.conditioning.things import SLOT_WORDS
from ldm.data import Scene
from ldm.data.rendering import THING_AREAS
from ldm.data.wording import grammar_words
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.dit import DiT
from ldm.models.unclip.decoder import Decoder, DecoderConfig, ImageConditionConfig
from ldm.training.caches.embeddings import check_embed_dim, embed, read_clip
from ldm.training.config import check_fraction
from ldm.training.draws import Draws
from ldm.training.inputs.emoji import EmojiImages
from ldm.training.inputs.slots import SlotCaption
from ldm.training.parts.exemplar import ExemplarPart, ExemplarTraining
from ldm.training.parts.layout import training_library
from ldm.weights.formats.exemplar_file import write_embeddings
from ldm.weights.formats.ldm_folder import WORDS_VOCABULARY, write_part, write_vocabulary

METRIC_SCENES = 8000
BARE = SlotCaption(words=(SLOT_WORDS[0],), areas=(THING_AREAS[0],), order=(0,))
"""The caption that states nothing but one thing."""


@dataclass(frozen=True, kw_only=True)
class ExemplarDecoderTraining(ExemplarTraining):
    """The configuration of the training; `net` is required, whose text tower is frozen.

    Args:
        vision: Folder of CLIP's image tower, which is frozen.
        condition: How the embedding is projected.
        bare: Share of captions of one thing that state the thing alone, so that all else is read from the
            embedding, in [0, 1]. Default: 0.5.
        drop_image: Share of embeddings replaced by the learned embedding of no image, in [0, 1].
            Default: 0.1.
    """

    vision: str
    condition: ImageConditionConfig
    bare: float = 0.5
    drop_image: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(bare=self.bare, drop_image=self.drop_image)
        if self.net is None:
            raise ValueError("net: expected the folder of a training of exemplars, got null")
        if self.grounding:
            raise ValueError(f"grounding {self.grounding}: expected 0, the decoder keeps what `net` learned")
        if self.condition.text_dim != self.model.context_dim or not self.condition.null_image:
            raise ValueError(
                f"condition: expected text_dim {self.model.context_dim}, the width of the text's tokens, and"
                f" null_image true, got {self.condition.text_dim} and {self.condition.null_image}"
            )

    @property
    def shape(self) -> DecoderConfig:
        """The shape of the decoder."""
        return DecoderConfig(dit=self.model, condition=self.condition)


class ExemplarDecoderPart(ExemplarPart):
    """A decoder with exemplars in training."""

    config: ExemplarDecoderTraining

    def __init__(self, config: ExemplarDecoderTraining, device: torch.device) -> None:
        super().__init__(config, device)
        self.clip = read_clip(None, config.vision).to(device)
        check_embed_dim("condition.embed_dim", config.condition.embed_dim, self.clip)
        self.text.requires_grad_(False)
        self.decoder = decoder_of(self.net, config.shape).to(device)
        self.denoiser = Denoiser(self.decoder, config.diffusion.make(), config.diffusion.prediction)
        self.model = nn.ModuleDict({"net": self.decoder})

    def drawn_condition(self, scenes: Sequence[Scene], draws: Draws) -> tuple[Cond, list[SlotCaption]]:
        """Return the condition of a batch, in which captions and embeddings are dropped, and its captions."""
        kept = self.kept(scenes, draws)
        bare = draws.random() < self.config.bare
        captions = [
            BARE if only and caption.order == (0,) else caption
            for caption, only in zip(self.captions(kept, draws.rngs), bare, strict=True)
        ]
        cond = self.read(captions, kept, draws.rngs, self.config.displaced)
        shown = draws.random() >= self.config.drop_image
        seen = [scene if show else None for scene, show in zip(kept, shown, strict=True)]
        return replace(cond, image_emb=self.embedded(seen)), captions

    def condition(
        self,
        scenes: Sequence[Scene | None],
        rngs: Sequence[np.random.Generator] | None,
        displaced: float = 0.0,
    ) -> Cond:
        """Return the condition of scenes; see `ExemplarPart.condition`."""
        return replace(super().condition(scenes, rngs, displaced), image_emb=self.embedded(scenes))

    def embedded(self, scenes: Sequence[Scene | None]) -> Tensor:
        """Return the embeddings of scenes (B, E); for None the learned one that means no image."""
        rows = [i for i, scene in enumerate(scenes) if scene is not None]
        vectors = self.decoder.condition.nothing().repeat(len(scenes), 1)  # (B, E)
        if rows:
            own = embed(self.clip, self.images, [scene for scene in scenes if scene is not None])
            vectors = vectors.index_copy(0, torch.tensor(rows, device=vectors.device), own.to(vectors))
        return vectors

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the decoder, with the name of its CLIP, its text tower, and the library's embeddings."""
        write_part(
            folder,
            "decoder",
            self.decoder,
            self.config.shape,
            clip=self.clip.name,
            diffusion=self.config.diffusion,
            figures=self.validate(),
            training=record,
        )
        tower = self.text.tower
        write_part(folder, "words", tower, tower.config, training=record)
        write_vocabulary(folder, self.text.tokenizer, sorted(grammar_words()), name=WORDS_VOCABULARY)
        index = fitted_index(self.clip, self.images)
        write_embeddings(folder, index.vectors(), index.metric)


def decoder_of(net: DiT, shape: DecoderConfig) -> Decoder:
    """Return a decoder that begins as a transformer: it reads the text's tokens as they are."""
    decoder = Decoder(shape)
    decoder.dit = net
    assert decoder.condition.text is not None
    nn.init.eye_(decoder.condition.text.weight)
    nn.init.zeros_(decoder.condition.text.bias)
    return decoder


def fitted_index(clip: ClipPair, images: EmojiImages) -> ExemplarIndex:
    """Return the index of `training_library`, with the metric of random scenes of one thing."""
    library = training_library(images.data)
    index = ExemplarIndex(library, clip)
    rng = np.random.default_rng(7)
    scenes = images.random(rng, METRIC_SCENES, replace(images.config.mix, two=0.0, count=0.0))
    row_of = {(exemplar.name, exemplar.style): row for row, exemplar in enumerate(library)}
    shown = (images.index[scene.rows()[0]] for scene in scenes)
    rows = [row_of[record.name, record.style] for record in shown]
    vectors = index.vectors()
    own = F.normalize(embed(clip, images, scenes), dim=-1).cpu()  # (n, E)
    index.metric = SceneMetric.fit(vectors, own - vectors[rows])
    return index
