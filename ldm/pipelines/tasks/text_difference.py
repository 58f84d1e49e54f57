"""Text differences: an image is moved along the direction between two texts in CLIP's space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.clip import ClipPair
from ldm.conditioning.image_embedding import ImageEmbedding, slerp
from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.pipelines.checks import check_count, check_unit_interval
from ldm.pipelines.protocol import EmbeddingPipeline
from ldm.pipelines.tasks.embeddings import draw_embeddings, invert_embedding, inverting_call


def text_difference(
    pipe: EmbeddingPipeline,
    image: ImageInput,
    source: str,
    target: str,
    *,
    n: int = 8,
    most: float = 0.5,
    seed: int = 0,
    invert: bool = True,
    **options: Any,
) -> Images:
    """Draw images from a given one, the first, towards what `target` has and `source` has not.

    The image's embedding turns towards the difference of the two texts' normalized embeddings (Ramesh et al.
    2022, section 3.3).

    Args:
        image: The image; see `ldm.images.pixels.to_pixels`.
        source: Text that describes the image.
        target: Text that describes the result.
        n: Number of images.
        most: Part of the arc that the last image has turned, in [0, 1]; the paper uses 0.25 to 0.5.
        seed: Seed of all images.
        invert: Start from the image's inverted noise.
        options: Options of `text_to_image`.

    Raises:
        ValueError: If `most` is outside [0, 1], or both texts have one embedding.
    """
    check_unit_interval(most=most)
    n = check_count(n)
    pixels = to_pixels(image)
    shared = {**options, "seed": [seed] * n}
    call = pipe.settle([""] * n, n=1, **shared)
    if invert:
        call = inverting_call(pipe, [""] * n, pixels, {**shared, "n": 1}, eta=0.0)
    start = pipe.clip.image_embedding(pixels)
    w = torch.linspace(0, most, n, device="cpu", dtype=torch.float32)
    path = _turned(pipe.clip, start, source, target, w)
    if invert:
        latents = invert_embedding(pipe, call, pixels, start)
        call = replace(call, latents=latents.expand(n, *latents.shape[1:]))
    facts = {"source": source, "target": target, "most": most, "invert": invert}
    return draw_embeddings(
        pipe,
        "text_difference",
        call,
        path,
        enlarge=not invert,
        facts=facts,
        image=pixels if invert else None,
        named=(source, target),
    )


def _turned(clip: ClipPair, start: ImageEmbedding, source: str, target: str, w: Tensor) -> ImageEmbedding:
    """Return embeddings on the arc from one (1, E) towards the difference of two texts, at weights w (B,).

    Raises:
        ValueError: If both texts have one embedding.
    """
    texts = clip.text_embedding([source, target]).unit().vector
    if torch.allclose(texts[0], texts[1], atol=1e-6):
        raise ValueError(
            f"source and target: {source!r} and {target!r} have one embedding, so there is no direction"
            " between them"
        )
    direction = F.normalize((texts[1] - texts[0])[None], dim=-1).to(start.vector.device)
    length = start.vector.norm(dim=1, keepdim=True)
    return replace(start, vector=slerp(start.vector, direction * length, w))
