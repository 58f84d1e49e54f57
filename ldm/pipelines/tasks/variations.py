"""Variations of an image: by noising it, or by its image embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.pipelines.protocol import EmbeddingPipeline, LatentPipeline, Request
from ldm.pipelines.tasks.embeddings import draw_embeddings, invert_embedding, inverting_call
from ldm.pipelines.tasks.sized import fit_image


def variations(
    pipe: LatentPipeline,
    image: ImageInput,
    *,
    n: int = 4,
    prompt: str | Sequence[str] = "",
    strength: float = 0.6,
    **options: Any,
) -> Images:
    """Draw variations of an image: `image_to_image`, with or without a prompt.

    A model that drafts the latent from the text takes the image's own latent as the draft if there is no
    prompt.

    Args:
        image: The image; see `ldm.images.pixels.to_pixels`.
        n: Number of variations.
        prompt: What the image shows. Default: not stated.
        strength: Part of the grid that is run, in [0, 1]; more varies more.
        options: Options of `text_to_image`; the size is the image's.
    """
    pixels, call, finish = fit_image(pipe, prompt, image, {**options, "n": n})
    draft = pipe.image_draft(pixels, prompted=any(call.prompts))
    request = Request(task="variations", given=pixels, strength=strength, draft=draft, finish=finish)
    return pipe.draw(call, request)


def embedding_variations(
    pipe: EmbeddingPipeline,
    image: ImageInput,
    *,
    n: int | None = None,
    prompt: str = "",
    invert: bool = False,
    eta: float = 1.0,
    **options: Any,
) -> Images:
    """Draw variations of an image from its CLIP embedding (Ramesh et al. 2022, section 3.1).

    Args:
        image: The image; see `ldm.images.pixels.to_pixels`.
        n: Number of variations. Default: the card's.
        prompt: Text for the decoder. Default: none.
        invert: Start from the noise that DDIM leads to the image from, so that embedding and noise (the
            paper's bipartite latent) hold all of the image. The size is then the image's, there are 50 steps
            unless `steps` says otherwise, each inverted by `iterations` (4) fixed-point iterations, and the
            upsamplers are not run.
        eta: With `invert`, how much is varied, in [0, 1]; 0 reconstructs the image.
        options: Options of `text_to_image`.

    Raises:
        ValueError: If the model has no vision tower, or more than one image is given.
    """
    pixels = to_pixels(image)
    if len(pixels) != 1:
        raise ValueError(f"image: expected one image, got {len(pixels)}")
    if not invert:
        call = pipe.settle(prompt, n=n, **options)
        return draw_embeddings(pipe, "variations", call, pipe.clip.image_embedding(pixels))
    call = inverting_call(pipe, prompt, pixels, {**options, "n": n}, eta=eta)
    embedding = pipe.clip.image_embedding(pixels)
    latents = invert_embedding(pipe, call, pixels, embedding)
    call = replace(call, latents=latents.expand(len(call.seeds), *latents.shape[1:]))
    facts = {"invert": True}
    return draw_embeddings(pipe, "variations", call, embedding, enlarge=False, facts=facts, image=pixels)
