"""CLIP as unCLIP uses it: texts and pictures into one space, and pictures judged by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.cond import Cond
from ldm.models.clip.towers import VisionTower

FLATTEST = 16  # sides in proportion, of a picture that is worth looking at


class ClipPair(nn.Module):
    """Both towers of one CLIP by its name; ``text`` is read with the embedding, not of length 1, in
    `Cond.pooled`. Either may be absent."""

    def __init__(self, name: str, *, text: TextConditioner | None, vision: VisionTower | None) -> None:
        super().__init__()
        if text is None and vision is None:
            raise ValueError(f"{name!r}: expected a text tower, a vision tower, or both")
        if text is not None and (not text.convention.pooled or text.tower.config.embed_dim is None):
            raise ValueError(
                f"{name!r}: the text tower gives embeddings, expected a projection, and pooled in its"
                " convention"
            )
        if text is not None and vision is not None and text.tower.config.embed_dim != vision.config.embed_dim:
            raise ValueError(
                f"{name!r}: embeddings {text.tower.config.embed_dim} wide of text and"
                f" {vision.config.embed_dim} of pictures are no pair"
            )
        self.name = name
        self.text = text
        self.vision = vision

    @property
    def width(self) -> int:
        """E, the width of an embedding."""
        width = self.text.tower.config.embed_dim if self.text is not None else self._vision().config.embed_dim
        assert width is not None
        return width

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Cond:
        """Texts as a prior and a decoder take them: token states, their mask and the embedding; ValueError
        without a text tower."""
        if self.text is None:
            raise ValueError(f"this model has no text tower of {self.name!r}: it takes pictures, not texts")
        return self.text(prompts)

    def text_embedding(self, prompts: Sequence[str]) -> ImageEmbedding:
        """The embeddings of B texts, in the space of those of pictures."""
        pooled = self.read(prompts).pooled
        assert pooled is not None
        return ImageEmbedding(vector=pooled.float(), clip=self.name)

    @torch.no_grad()
    def image_embedding(self, pixels: Tensor) -> ImageEmbedding:
        """The embeddings of pictures (B, 3, H, W) in [0, 1]; ValueError without a vision tower, or for one of
        which it would see nearly nothing."""
        tower = self._vision()
        h, w = pixels.shape[-2:]
        if max(h, w) > FLATTEST * min(h, w):
            raise ValueError(
                f"image: CLIP sees the square in the middle, next to nothing of {w}×{h}; expected sides of"
                f" 1:{FLATTEST} at most"
            )
        weight = tower.conv1.weight
        return ImageEmbedding(
            vector=tower(tower.prepare(pixels.to(weight.device)).to(weight.dtype)).pooled.float(),
            clip=self.name,
        )

    @torch.no_grad()
    def black(self) -> ImageEmbedding:
        """The embedding (1, E) of zeros as the tower's input, which Kandinsky takes for no picture."""
        tower = self._vision()
        size, weight = tower.config.image_size, tower.conv1.weight
        zeros = torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype)
        return ImageEmbedding(vector=tower(zeros).pooled.float(), clip=self.name)

    def _vision(self) -> VisionTower:
        if self.vision is None:
            raise ValueError(f"this model has no vision tower of {self.name!r}: it cannot look at pictures")
        return self.vision

    def similarity(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine of each picture (B, 3, H, W) in [0, 1] and its prompt, (B,)."""
        images = self.image_embedding(pixels).unit().vector
        return F.cosine_similarity(images, self.text_embedding(prompts).vector.to(images.device), dim=-1)
