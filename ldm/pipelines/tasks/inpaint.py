"""Inpainting: the masked part of an image is drawn, every other pixel is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm.images.canvas import Canvas
from ldm.images.pixels import ImageInput
from ldm.images.result import Images
from ldm.pipelines.protocol import Pipeline
from ldm.pipelines.tasks.border import Border, fill_canvas


def inpaint(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    mask: ImageInput,
    *,
    strength: float = 1.0,
    resample: int = 1,
    jump: int = 5,
    seam: float | None = None,
    feather: int = 0,
    window: int | None = None,
    **options: Any,
) -> Images:
    """Draw the masked part of an image; every other pixel equals the given one.

    A model with input channels for mask and image is given both. Any other keeps the known part of the state
    (`ldm.diffusion.constraints.keep_known`). A model that drafts starts from the draft of the hole, half of
    the grid being run, where the draft covers the image.

    Args:
        prompt: What to draw in the hole, or in the whole image.
        image: One image, or one for each image to be made; see `ldm.images.pixels.to_pixels`. A size that
            does not fit the model is padded by repeating the last column and row, with a `Padded` warning,
            and the result is cut back.
        mask: Mask of the image's size, white (1) where to draw, thresholded at one half; not black
            everywhere. What it hides is not looked at unless `strength` is below 1.
        strength: Part of the grid that is run from the given image, as in `image_to_image`; 1: pure noise.
        resample: Number of times that each stretch of `jump` steps is taken (RePaint, Lugmayr et al. 2022).
        jump: Steps in such a stretch.
        seam: Distance in pixels over which the new part is corrected to meet the known one; 0: no correction.
            Default: an eighth of the model's side.
        feather: Width in pixels, inside the mask, of the transition to the new part.
        window: Side in pixels of what the network sees at a time. Default: the whole image.
        options: Options of `text_to_image`; the size is the image's.

    Raises:
        ValueError: If the mask is black or of another size, or an option is wrong.
    """
    canvas = Canvas.masked(image, mask, multiple=pipe.stage.multiple)
    border = Border(seam=seam, feather=feather, resample=resample, jump=jump, window=window)
    return fill_canvas(pipe, "inpaint", prompt, canvas, border, options, strength=strength)
