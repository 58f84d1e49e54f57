"""Image-to-image: sampling starts from a noised image (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm.images.pixels import ImageInput, to_depth
from ldm.images.result import Images
from ldm.pipelines.protocol import Pipeline, Request
from ldm.pipelines.tasks.sized import fit_image


def image_to_image(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    *,
    strength: float = 0.75,
    **options: Any,
) -> Images:
    """Draw images of a prompt that start from a given image (SDEdit, Meng et al. 2022).

    Args:
        prompt: What to draw.
        image: One image, or one for each image to be made; see `ldm.images.pixels.to_pixels`. A size that
            does not fit the model is padded by repeating the last column and row, with a `Padded` warning,
            and the result is cut back.
        strength: Part of the grid that is run, in [0, 1]. 1 is pure noise, and the image is not looked at; 0
            gives the image as the autoencoder reconstructs it.
        options: Options of `text_to_image`; the size is the image's, and `latents` is the noise that is
            added.

    Raises:
        ValueError: If the image cannot be read, or an option is wrong.
    """
    pixels, call, finish = fit_image(pipe, prompt, image, options)
    return pipe.draw(call, Request(task="image_to_image", given=pixels, strength=strength, finish=finish))


def depth_to_image(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    depth: ImageInput,
    *,
    strength: float = 0.8,
    **options: Any,
) -> Images:
    """Draw images of a prompt that start from an image, with a depth map as a condition.

    Args:
        prompt: What to draw.
        image: As in `image_to_image`.
        depth: Depth map (H, W) or (B, 1, H, W) in any unit and size; nearer is larger.
        strength: Part of the grid that is run, in [0, 1].
        options: Options of `text_to_image`; the size is the image's.

    Raises:
        ValueError: If the model takes no depth map.
    """
    pipe.stage.require("depth")
    pixels, call, finish = fit_image(pipe, prompt, image, options)
    channels = to_depth(depth, pipe.stage.shape(call)[1:]).to(pipe.stage.device)
    request = Request(
        task="depth_to_image", given=pixels, strength=strength, extra={"concat": channels}, finish=finish
    )
    return pipe.draw(call, request)
