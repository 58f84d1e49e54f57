"""Images drawn from CLIP's image embeddings: what the tasks of unCLIP share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.images.result import Images
from ldm.pipelines.call import Call
from ldm.pipelines.protocol import EmbeddingPipeline, Request
from ldm.pipelines.tasks.inversion import invertible_call
from ldm.samplers.invert import ddim_invert


def draw_embeddings(
    pipe: EmbeddingPipeline,
    task: str,
    call: Call,
    embedding: ImageEmbedding,
    *,
    enlarge: bool = True,
    facts: Mapping[str, Any] | None = None,
    image: Tensor | None = None,
    named: Sequence[str] = (),
) -> Images:
    """Draw images of given embeddings, one or one for each image of the call.

    Args:
        pipe: The pipeline.
        task: Name of the task.
        call: The call.
        embedding: The embeddings.
        enlarge: Whether the upsamplers are run. Default: True.
        facts: What the recipe states besides. Default: nothing.
        image: The images whose inverted noise the call starts from, (1 or B, 3, H, W) in [0, 1]. Default:
            none.
        named: Texts that name what the images show, where the call has no prompt. Default: none.
    """
    request = Request(
        task=task,
        pair=lambda size: pipe.conditions_of(call, embedding, image=image, named=named),
        enlarge=enlarge,
        facts=facts or {},
    )
    return pipe.draw(call, request)


@torch.no_grad()
def invert_embedding(
    pipe: EmbeddingPipeline, call: Call, pixels: Tensor, embedding: ImageEmbedding
) -> Tensor:
    """Lead an image back to noise by DDIM, under its embedding and without guidance.

    Args:
        pipe: The pipeline.
        call: The call that will start from the noise; see `inverting_call`. Its option `iterations` (4) is
            the number of fixed-point iterations.
        pixels: The image (1, 3, H, W) in [0, 1].
        embedding: Its embedding.

    Returns:
        The noise (1, C, h, w).
    """
    one = replace(call, prompts=call.prompts[:1], seeds=call.seeds[:1], guidance=1.0)
    stage = pipe.stage
    fn = stage.guided(one, pipe.conditions_of(one, embedding, image=pixels))
    iterations = call.others.get("iterations", 4)
    return ddim_invert(fn, stage.encode(pixels), call.grid, iterations=iterations)


def inverting_call(
    pipe: EmbeddingPipeline, prompt: Any, pixels: Tensor, options: Mapping[str, Any], *, eta: float
) -> Call:
    """Settle a call that starts from an image's inverted noise.

    Args:
        pipe: The pipeline.
        prompt: The prompts.
        pixels: The image (1, 3, H, W) in [0, 1].
        options: Options of the call; guidance 1 by default.
        eta: Noise that DDIM adds on the way back.
    """
    guidance = 1.0 if options.get("guidance") is None else options["guidance"]
    return invertible_call(pipe, prompt, pixels, {**options, "guidance": guidance, "eta": eta})
