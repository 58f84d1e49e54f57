"""Tasks that keep some tokens of a given image: inpainting, and variations by completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.images.canvas import Canvas, check_border
from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.pipelines.checks import check_unit_interval
from ldm.pipelines.dalle.token_call import TokenCall
from ldm.pipelines.dalle.token_images import ABSENT, TokenImages
from ldm.pipelines.tasks.border import REACH


class TokenPipeline(Protocol):
    """What the tasks need of a model that draws tokens."""

    @property
    def images(self) -> TokenImages:
        """The autoencoder."""

    @property
    def side(self) -> int:
        """Side of an image in pixels."""

    def settle(self, prompt: Any, **options: Any) -> TokenCall:
        """Settle the options of a call and check them."""

    def draw(
        self,
        call: TokenCall,
        task: str,
        *,
        known: Tensor | None = None,
        given: Tensor | None = None,
        canvas: Canvas | None = None,
        **facts: Any,
    ) -> Images:
        """Draw the tokens that are not known, and the images."""


def token_inpaint(
    pipe: TokenPipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    mask: ImageInput,
    *,
    seam: float | None = None,
    feather: int = 0,
    **options: Any,
) -> Images:
    """Draw the masked part of an image; every other pixel equals the given one.

    The tokens of the known part are kept, and the others drawn in their order, so that a new token depends on
    the known ones above it and to its left, not on those that follow. Exemplars are shown in the layout that
    fits the known tokens.

    Args:
        prompt: What to draw in the hole, or in the whole image.
        image: One image, or one for each image to be made, of the model's size; see
            `ldm.images.pixels.to_pixels`.
        mask: Mask of the image's size, white (1) where to draw; not black everywhere.
        seam: Distance in pixels over which the new part is corrected to meet the known one; 0: no correction.
            Default: an eighth of the side.
        feather: Width in pixels, inside the mask, of the transition to the new part. Default: 0.
        options: Options of `text_to_image`.

    Raises:
        ValueError: If the image or the mask is of another size, the mask is black, an option is wrong, or the
            model has no encoder of images.
    """
    canvas = Canvas.masked(image, mask)
    reach = pipe.side / REACH if seam is None else float(seam)
    check_border(reach, feather)
    call = pipe.settle(prompt, **options)
    tokens = known_tokens(pipe, canvas.filled(), len(call.seeds))  # (B, h, w)
    hole = canvas.small(tokens.shape[-2:])[:, 0].to(tokens.device) > 0  # (B or 1, h, w)
    if len(hole) not in (1, len(tokens)):
        raise ValueError(
            f"mask: {len(hole)} masks for {len(tokens)} images to be made; expected one, or one for each"
        )
    known = tokens.masked_fill(hole, ABSENT)
    return pipe.draw(call, "inpaint", known=known, canvas=canvas, seam=reach, feather=feather)


def token_variations(
    pipe: TokenPipeline,
    image: ImageInput,
    *,
    n: int | None = None,
    prompt: str | Sequence[str] = "",
    strength: float = 0.6,
    **options: Any,
) -> Images:
    """Draw variations of an image: its first rows of tokens are kept, and the rest is drawn again.

    This is the completion of Ramesh et al. (2021), figure 2. A model with exemplars is shown the image itself
    where there is no prompt.

    Args:
        image: One image of the model's size; see `ldm.images.pixels.to_pixels`.
        n: Number of variations. Default: the card's.
        prompt: What the image shows. Default: not stated.
        strength: Part of the rows that is drawn again, in [0, 1].
        options: Options of `text_to_image`.

    Raises:
        ValueError: If the image is of another size, an option is wrong, or the model has no encoder of
            images.
    """
    check_unit_interval(strength=strength)
    call = pipe.settle(prompt, n=n, **options)
    pixels = to_pixels(image)
    tokens = known_tokens(pipe, pixels, len(call.seeds))  # (B, h, w)
    kept = round((1 - strength) * tokens.shape[1])
    tokens[:, kept:] = ABSENT
    return pipe.draw(call, "variations", known=tokens, given=pixels, strength=strength)


def known_tokens(pipe: TokenPipeline, pixels: Tensor, count: int) -> Tensor:
    """Return the tokens (B, h, w) of images that B images are made of.

    Args:
        pipe: The pipeline.
        pixels: One image, or B, shape (·, 3, H, W), in [0, 1].
        count: Number B of images to be made.

    Raises:
        ValueError: If there are other numbers of images, or they are of another size than the model's.
    """
    if pixels.shape[-2:] != (pipe.side, pipe.side):
        h, w = pixels.shape[-2:]
        raise ValueError(
            f"image: expected {pipe.side}×{pipe.side} pixels, the size of the model, got {w}×{h}"
        )
    if len(pixels) not in (1, count):
        raise ValueError(f"image: {len(pixels)} images for {count} to be made; expected one, or one for each")
    with torch.no_grad():
        tokens = pipe.images.encode(pixels)
    return tokens.expand(count, -1, -1).clone()
