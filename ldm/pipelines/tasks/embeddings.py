"""Images drawn from CLIP's image embeddings: what the tasks of unCLIP share."""

from __future__ import annotations

from collections.abc import Mapping
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
) -> Images:
    """Draw images of given embeddings, one or one for each image of the call."""
    request = Request(
        task=task,
        pair=lambda size: pipe.conditions_of(call, embedding),
        enlarge=enlarge,
        facts=facts or {},
    )
    return pipe.draw(call, request)


@torch.no_grad()
def invert_embedding(
    pipe: EmbeddingPipeline,
    pixels: Tensor,
    embedding: ImageEmbedding,
    prompt: Any,
    *,
    eta: float,
    **options: Any,
) -> tuple[Tensor, Call]:
    """Lead an image back to noise by DDIM, under its embedding and without guidance.

    Args:
        pipe: The pipeline.
        pixels: The image (1, 3, H, W) in [0, 1].
        embedding: Its embedding.
        prompt: The prompts of the call that will start from the noise.
        eta: Noise that DDIM adds on the way back.
        options: Options of that call; guidance 1 by default. `iterations` (4): fixed-point iterations.

    Returns:
        The noise (1, C, h, w), and the call.
    """
    guidance = 1.0 if options.get("guidance") is None else options["guidance"]
    call = invertible_call(pipe, prompt, pixels, {**options, "guidance": guidance, "eta": eta})
    one = replace(call, prompts=call.prompts[:1], seeds=call.seeds[:1], guidance=1.0)
    stage = pipe.stage
    fn = stage.guided(one, pipe.conditions_of(one, embedding))
    iterations = options.get("iterations", 4)
    return ddim_invert(fn, stage.encode(pixels), call.grid, iterations=iterations), call
