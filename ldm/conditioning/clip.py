"""The two towers of one CLIP: texts and images in one space of embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.cond import Cond
from ldm.models.clip.towers import VisionTower
from ldm.support.device import computing_dtype

MAX_ASPECT = 16  # largest ratio of an image's sides; CLIP sees only the square in the middle


class ClipPair(nn.Module):
    """The text tower, the vision tower, or both, of one CLIP.

    Args:
        name: Name of the CLIP, which its embeddings carry.
        text: The text tower; its convention must include the pooled embedding. None if absent.
        vision: The vision tower. None if absent.

    Raises:
        ValueError: If both are absent, the text tower gives no embedding, or the widths differ.
    """

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
                f"{name!r}: the text tower's embeddings are {text.tower.config.embed_dim} wide, the vision"
                f" tower's {vision.config.embed_dim}; expected the same width"
            )
        self.name = name
        self.text = text
        self.vision = vision

    @property
    def width(self) -> int:
        """E, the width of an embedding."""
        config = self._require_vision().config if self.text is None else self.text.tower.config
        assert config.embed_dim is not None
        return config.embed_dim

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Cond:
        """Return the condition of B texts: context (B, L, D), its mask, and the embedding as pooled (B, E).

        The embedding is not normalised.

        Raises:
            ValueError: If there is no text tower.
        """
        if self.text is None:
            raise ValueError(f"this model has no text tower of {self.name!r}: it takes images, not texts")
        return self.text(prompts)

    def text_embedding(self, prompts: Sequence[str]) -> ImageEmbedding:
        """Return the embeddings of B texts, in the space of image embeddings."""
        pooled = self.read(prompts).pooled
        assert pooled is not None
        return ImageEmbedding(vector=pooled.float(), clip=self.name)

    @torch.no_grad()
    def image_embedding(self, pixels: Tensor) -> ImageEmbedding:
        """Return the embeddings of images.

        Args:
            pixels: The images, shape (B, 3, H, W), in [0, 1], with sides of at most 1:16.

        Raises:
            ValueError: If there is no vision tower, or the images are too long.
        """
        tower = self._require_vision()
        h, w = pixels.shape[-2:]
        if max(h, w) > MAX_ASPECT * min(h, w):
            raise ValueError(
                f"image: CLIP sees only the square in the middle of {w}×{h}; expected sides of at most"
                f" 1:{MAX_ASPECT}"
            )
        prepared = tower.prepare(pixels.to(tower.conv1.weight.device)).to(computing_dtype(tower))
        return ImageEmbedding(vector=tower(prepared).pooled.float(), clip=self.name)

    @torch.no_grad()
    def black(self) -> ImageEmbedding:
        """Return the embedding (1, E) of an input of zeros, which stands for "no image" in Kandinsky."""
        tower = self._require_vision()
        size, device = tower.config.image_size, tower.conv1.weight.device
        zeros = torch.zeros(1, 3, size, size, device=device, dtype=computing_dtype(tower))
        return ImageEmbedding(vector=tower(zeros).pooled.float(), clip=self.name)

    def _require_vision(self) -> VisionTower:
        if self.vision is None:
            raise ValueError(f"this model has no vision tower of {self.name!r}: it cannot read images")
        return self.vision

    def similarity(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image (B, 3, H, W) in [0, 1] and its prompt, shape (B,)."""
        images = self.image_embedding(pixels).unit().vector
        return F.cosine_similarity(images, self.text_embedding(prompts).vector.to(images.device), dim=-1)
