"""Calls of the size of given images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ldm.images.canvas import pad_to_multiple
from ldm.images.pixels import ImageInput, to_pixels
from ldm.pipelines.call import Call
from ldm.pipelines.protocol import Pipeline


def settle_size(
    pipe: Pipeline, prompt: Any, pixels: Tensor, options: Mapping[str, Any], frame: tuple[int, int]
) -> Call:
    """Settle a call of the size of given images.

    Args:
        pipe: The pipeline.
        prompt: The prompt or prompts.
        pixels: The images (B or 1, 3, H, W), padded to a size that the model makes.
        options: Options of the call.
        frame: (height, width) of the part that was given or is wanted, which error messages name.

    Raises:
        ValueError: If the options state another size, or the number of images is neither 1 nor that of the
            images to be made.
    """
    for name, side in zip(("height", "width"), frame, strict=True):
        if options.get(name) not in (None, side):
            raise ValueError(f"{name} {options[name]}: the image has {side}; resize it first")
    call = pipe.settle(prompt, **{**options, "height": pixels.shape[-2], "width": pixels.shape[-1]})
    if len(pixels) not in (1, len(call.seeds)):
        raise ValueError(
            f"{len(pixels)} images for {len(call.seeds)} to be made: expected one, or one for each"
        )
    return call


def fit_image(
    pipe: Pipeline, prompt: Any, image: ImageInput, options: Mapping[str, Any]
) -> tuple[Tensor, Call, Callable[[Tensor], Tensor]]:
    """Read images, pad them to a size that the model makes, and settle a call of that size.

    Returns:
        The padded images (B or 1, 3, H, W) in [0, 1], the call, and the function that cuts results back to
        the size of the given images.
    """
    pixels = to_pixels(image)
    h, w = pixels.shape[-2:]
    padded = pad_to_multiple(pixels, pipe.stage.multiple)
    return padded, settle_size(pipe, prompt, padded, options, (h, w)), lambda made: made[..., :h, :w]
