"""Inversion: images led back to noise, and drawn from it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.interfaces import DenoiseFn
from ldm.images.canvas import pad_to_multiple
from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.pipelines.call import Call
from ldm.pipelines.protocol import Known, LatentPipeline, Pipeline, Request
from ldm.pipelines.tasks.sized import settle_size
from ldm.samplers.invert import NOISIEST, ddim_invert, edict, edict_invert
from ldm.samplers.ode.ddim import ddim

STEPS = 50  # of an inversion, unless the caller asks for another number


@dataclass(frozen=True, kw_only=True, eq=False)
class Inverted:
    """Images led back to noise.

    Attributes:
        call: The call of the way back to images.
        denoise: The unguided denoiser that led them there.
        tracks: Their noisy states (B, C, h, w): two coupled ones for an exact inversion, else one.
        frame: (height, width) of the images before padding.
    """

    call: Call
    denoise: DenoiseFn
    tracks: Sequence[Tensor]
    frame: tuple[int, int]


def invertible_call(pipe: Pipeline, prompt: Any, pixels: Tensor, options: Mapping[str, Any]) -> Call:
    """Settle the call of an inversion: DDIM, on the part of the grid where x/alpha still holds the image.

    Raises:
        ValueError: If another sampler is asked for.
    """
    if options.get("sampler") not in (None, "ddim"):
        raise ValueError(f"sampler {options['sampler']!r}: inversion runs ddim backwards; leave it out")
    given = {name: value for name, value in options.items() if value is not None}
    own = {"steps": STEPS, **given, "sampler": "ddim"}
    call = settle_size(pipe, prompt, pixels, own, (pixels.shape[-2], pixels.shape[-1]))
    return call.over(call.grid.from_ratio(NOISIEST))


def unguided(pipe: LatentPipeline, call: Call, draft: Known | None = None) -> DenoiseFn:
    """Return the denoiser of a call without guidance."""
    plain = replace(call, guidance=1.0)
    return pipe.stage.guided(plain, pipe.paired(plain, Request(task="invert", draft=draft)))


@torch.no_grad()
def invert(
    pipe: LatentPipeline,
    image: ImageInput,
    *,
    source: str,
    prompt: str,
    exact: bool = True,
    iterations: int = 1,
    strength: float = 1.0,
    **options: Any,
) -> Inverted:
    """Invert images under one prompt, without guidance; they will be drawn again under another.

    Args:
        pipe: The pipeline.
        image: The images; see `ldm.images.pixels.to_pixels`.
        source: The prompt that describes the images.
        prompt: The prompt of the way back.
        exact: Invert by two coupled tracks (EDICT, Wallace et al. 2023), which can be undone up to rounding;
            else by DDIM.
        iterations: Fixed-point iterations of each DDIM step.
        strength: Part of the grid that is inverted, in (0, 1].
        options: Options of the call.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength: expected more than 0 and at most 1, got {strength}")
    pixels = to_pixels(image)
    frame = (pixels.shape[-2], pixels.shape[-1])
    pixels = pad_to_multiple(pixels, pipe.stage.multiple)
    call = invertible_call(pipe, [prompt] * len(pixels), pixels, options)
    call = call.over(call.grid.tail(strength))
    z = pipe.stage.encode(pixels).double()  # two tracks amplify rounding errors
    draft = pipe.image_draft(pixels, prompted=bool(source))
    denoise = unguided(pipe, replace(call, prompts=(source,) * len(pixels)), draft)
    tracks: Sequence[Tensor]
    if exact:
        tracks = edict_invert(denoise, z, z, call.grid)
    else:
        tracks = [ddim_invert(denoise, z, call.grid, iterations=iterations)]
    return Inverted(call=call, denoise=denoise, tracks=tracks, frame=frame)


@torch.no_grad()
def draw_inverted(
    pipe: Pipeline, task: str, inverted: Inverted, denoise: DenoiseFn, facts: Mapping[str, Any]
) -> Images:
    """Draw the images that a denoiser makes of inverted ones.

    Of a batch that holds more states than the call has images, the last ones are drawn.
    """
    call, tracks, (h, w) = inverted.call, inverted.tracks, inverted.frame
    if len(tracks) == 2:
        x = edict(denoise, tracks[0], tracks[1], call.grid)[0]
    else:
        x = ddim(denoise, tracks[0], call.grid)
    pixels = pipe.stage.images.decode(x[-len(call.seeds) :].float())[..., :h, :w]
    return pipe.finish_images(call, pixels, Request(task=task, facts=facts))
