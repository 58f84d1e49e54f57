"""Upscaling: by a model that is given the small image, or by image-to-image in windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.noise import keyed_normal
from ldm.images.opening import check_pixels
from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.pipelines.protocol import LatentPipeline, Request
from ldm.pipelines.tasks.sized import fit_image

LOW_NOISE = 2**62  # draw of a seed that noises an upscaler's input; no sampler uses it
NOISE_LEVELS = 350  # of Stable Diffusion's x4 upscaler


def upscale(
    pipe: LatentPipeline,
    image: ImageInput,
    prompt: str | Sequence[str] = "",
    *,
    factor: int | None = None,
    strength: float = 0.3,
    noise_level: int = 20,
    window: int | None = None,
    **options: Any,
) -> Images:
    """Enlarge an image.

    A model that is given the small image enlarges by its autoencoder's factor (4). Any other model gets the
    image enlarged by bicubic interpolation, and sharpens it by `image_to_image`.

    Args:
        image: The image; see `ldm.images.pixels.to_pixels`.
        prompt: What the image shows. Default: not stated.
        factor: How many times the sides grow. Default: 2, or the upscaler's own factor.
        strength: For ordinary models, the part of the grid that is run, in [0, 1].
        noise_level: For upscalers that are given it, the timestep that the small image is noised to, 0 to
            349.
        window: Side in pixels of what the network sees at a time; windows overlap by half (Bar-Tal et al.
            2023). Default: the model's own side, or the whole image for upscalers.
        options: Options of `text_to_image`.

    Raises:
        ValueError: If the factor or the noise level is wrong.
    """
    small, stage = to_pixels(image), pipe.stage
    if stage.concat not in ("lowres", "lowres-noised"):
        if stage.concat is not None:
            stage.require("lowres", "lowres-noised")
        return _enlarge(pipe, small, prompt, 2 if factor is None else factor, strength, window, options)
    low = 2 * small.to(stage.device) - 1
    own = stage.images.factor
    if factor not in (None, own):
        raise ValueError(f"factor {factor}: {stage.name!r} enlarges {own} times")
    call = pipe.settle(prompt, **{**options, "height": own * low.shape[-2], "width": own * low.shape[-1]})
    extra: dict[str, Tensor] = {"concat": low}
    if stage.concat == "lowres-noised":
        if not 0 <= noise_level < NOISE_LEVELS:
            raise ValueError(f"noise_level: expected 0 to {NOISE_LEVELS - 1}, got {noise_level}")
        noise = torch.stack([keyed_normal(seed, LOW_NOISE, low.shape[1:]) for seed in call.seeds])
        low = low.expand(len(call.seeds), -1, -1, -1)
        noised = stage.denoiser.schedule.add_noise(low, noise_level, noise.to(stage.device))
        extra = {"concat": noised, "pooled": torch.full((len(low),), noise_level, device="cpu")}
    request = Request(task="upscale", extra=extra, window=window, facts={"noise_level": noise_level})
    return pipe.draw(call, request)


def _enlarge(
    pipe: LatentPipeline,
    small: Tensor,
    prompt: Any,
    factor: int,
    strength: float,
    window: int | None,
    options: Mapping[str, Any],
) -> Images:
    """Enlarge an image by interpolation, then sharpen it by `image_to_image` in windows."""
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 2:
        raise ValueError(f"factor: expected a whole number of at least 2, got {factor!r}")
    size = (factor * small.shape[-2], factor * small.shape[-1])
    check_pixels(size[1], size[0])
    large = F.interpolate(small, size, mode="bicubic", antialias=True).clamp(0, 1)
    pixels, call, finish = fit_image(pipe, prompt, large, options)
    side = pipe.stage.side if window is None else window
    pipe.stage.tile(size, side)
    request = Request(
        task="upscale",
        given=pixels,
        strength=strength,
        draft=pipe.image_draft(pixels),
        window=side,
        finish=finish,
        facts={"factor": factor, "window": side},
    )
    return pipe.draw(call, request)
