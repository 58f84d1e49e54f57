"""Reconstruction: an image led to noise and back."""

from __future__ import annotations

from typing import Any

from ldm.images.pixels import ImageInput
from ldm.images.result import Images
from ldm.pipelines.protocol import EmbeddingPipeline, LatentPipeline
from ldm.pipelines.replayable import replayable
from ldm.pipelines.tasks.inversion import draw_inverted, invert
from ldm.pipelines.tasks.variations import embedding_variations


def reconstruct(
    pipe: LatentPipeline,
    image: ImageInput,
    *,
    prompt: str = "",
    exact: bool = True,
    iterations: int = 4,
    **options: Any,
) -> Images:
    """Draw an image again from the noise that it is inverted to, without guidance.

    Args:
        image: The images; see `ldm.images.pixels.to_pixels`.
        prompt: What the image shows. Default: not stated.
        exact: Use two coupled tracks, which are undone exactly (EDICT, Wallace et al. 2023): what is lost is
            what the autoencoder loses. Else DDIM, which also loses what its iteration leaves.
        iterations: Fixed-point iterations of each DDIM step, if not `exact`.
        options: Options of `text_to_image`; 50 steps by default.
    """
    if options.get("guidance") is None:
        options = {**options, "guidance": 1.0}
    inverted = invert(
        pipe, image, source=prompt, prompt=prompt, exact=exact, iterations=iterations, **options
    )
    return draw_inverted(pipe, "reconstruct", inverted, inverted.denoise, {"exact": exact})


def embedding_reconstruct(pipe: EmbeddingPipeline, image: ImageInput, **options: Any) -> Images:
    """Draw an image again from its CLIP embedding and its inverted noise.

    It is `variations` with `invert`, `eta` 0 and, by default, one image; so its recipe is that of variations.
    """
    vary = replayable(embedding_variations)
    return vary(pipe, image, **{"n": 1, **options, "invert": True, "eta": 0.0})
