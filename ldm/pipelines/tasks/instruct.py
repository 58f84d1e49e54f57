"""Instructions: an image is changed as a sentence asks (InstructPix2Pix, Brooks et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm.images.pixels import ImageInput
from ldm.images.result import Images
from ldm.pipelines.protocol import Pipeline, Request
from ldm.pipelines.tasks.sized import fit_image


def instruct(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    *,
    image_guidance: float = 1.5,
    **options: Any,
) -> Images:
    """Change an image as a sentence asks (InstructPix2Pix, Brooks et al. 2023, eq. 3).

    Args:
        prompt: The instruction, such as "make it red".
        image: One image, or one for each image to be made; see `ldm.images.pixels.to_pixels`.
        image_guidance: Weight of the image; `guidance` is the weight of the sentence.
        options: Options of `text_to_image`; the size is the image's.

    Raises:
        ValueError: If the model takes no image beside the latent.
    """
    pipe.stage.require("image")
    pixels, call, finish = fit_image(pipe, prompt, image, options)
    stage = pipe.stage
    unscaled = stage.images.unscaled(stage.encode(pixels))
    request = Request(
        task="instruct",
        extra={"concat": unscaled},
        image_guidance=image_guidance,
        finish=finish,
        facts={"image_guidance": image_guidance},
    )
    return pipe.draw(call, request)
