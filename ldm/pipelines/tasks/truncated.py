"""Truncation: images of an embedding of which only the first principal components are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.models.unclip.embedding_codes import EmbeddingCodes, truncate
from ldm.pipelines.protocol import EmbeddingPipeline
from ldm.pipelines.tasks.embeddings import draw_embeddings
from ldm.support.scalars import whole_number


def truncated(
    pipe: EmbeddingPipeline,
    image: ImageInput,
    codes: EmbeddingCodes,
    components: Sequence[int],
    *,
    seed: int = 0,
    **options: Any,
) -> Images:
    """Draw images of an embedding reduced to its first principal components (Ramesh et al. 2022, figure 7).

    Args:
        image: The image; see `ldm.images.pixels.to_pixels`.
        codes: Principal components of embeddings of this CLIP; see `EmbeddingCodes.fit`.
        components: Number of components kept, one for each image to be made.
        seed: Seed of all images.
        options: Options of `text_to_image`.
    """
    counts = [whole_number("components", k, least=0) for k in components]
    call = pipe.settle([""] * len(counts), n=1, **{**options, "seed": [seed] * len(counts)})
    whole = pipe.clip.image_embedding(to_pixels(image))
    parts = torch.cat([truncate(whole.vector.cpu(), k, codes) for k in counts])
    facts = {"components": counts}
    return draw_embeddings(pipe, "truncated", call, replace(whole, vector=parts), facts=facts)
