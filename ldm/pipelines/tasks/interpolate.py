"""Interpolation: images on the way from one end to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.image_embedding import slerp
from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.pipelines.checks import check_path_count
from ldm.pipelines.conditions import Pair, between_conditions
from ldm.pipelines.protocol import EmbeddingPipeline, Known, LatentPipeline, Request
from ldm.pipelines.tasks.embeddings import draw_embeddings, invert_embedding, inverting_call
from ldm.pipelines.tasks.inversion import draw_inverted, invert, unguided
from ldm.pipelines.unclip_options import prior_options


def interpolate(
    pipe: LatentPipeline,
    a: Any,
    b: Any,
    *,
    n: int = 8,
    prompt: str = "",
    seed: int = 0,
    steps: int | None = None,
    **options: Any,
) -> Images:
    """Draw images on the way from `a` to `b`, both included.

    - Two texts: straight lines between their conditions, under the noise of one seed.
    - Two whole numbers: the arc between the noise of these seeds, under `prompt`.
    - Two images of one size (a path as a `Path`): the arc between the states that they are inverted to, as in
      `reconstruct`, under `prompt`. The ends are the images as the autoencoder gives them.

    Args:
        a, b: The ends, of one kind.
        n: Number of images, at least 2.
        prompt: Prompt between seeds or images.
        seed: Seed between texts.
        steps: Sampling steps. Default: the card's; 50 between images.
        options: Options of `text_to_image`.

    Raises:
        TypeError: If the ends are of different kinds.
        ValueError: If `n` is below 2, or images differ in size.
    """
    check_path_count(n)
    kinds = [_kind_of(end) for end in (a, b)]
    if kinds[0] is not kinds[1]:
        raise TypeError(
            f"a and b: expected two texts, two seeds, or two images, got {type(a).__name__} and"
            f" {type(b).__name__}"
        )
    w = torch.linspace(0, 1, n, device="cpu", dtype=torch.float32)
    if kinds[0] is str:
        return _between_texts(pipe, a, b, w, {**options, "steps": steps, "seed": [seed] * n})
    if kinds[0] is int:
        return _between_seeds(pipe, a, b, w, prompt, {**options, "steps": steps})
    return _between_images(pipe, a, b, w, prompt, {**options, "steps": steps, "seed": [seed] * n})


def _kind_of(end: Any) -> type:
    if isinstance(end, str):
        return str
    return int if isinstance(end, int) and not isinstance(end, bool) else Path


def _between_texts(pipe: LatentPipeline, a: str, b: str, w: Tensor, options: Mapping[str, Any]) -> Images:
    n = len(w)
    call = pipe.settle([a] * (n - 1) + [b], **options)
    ends = replace(call, prompts=(a, b), seeds=call.seeds[:2])

    def pair(size: tuple[int, int]) -> Pair:
        cond, uncond = pipe.conditions(ends, size)
        return between_conditions(cond[:1], cond[1:], w), uncond[:1]

    request = Request(task="interpolate", pair=pair, facts={"prompt": [a, b], "n": n})
    names = [f"{a} → {b}, {part:.2f}" if 0 < part < 1 else (a, b)[part == 1] for part in w.tolist()]
    return replace(pipe.draw(call, request), prompts=tuple(names))


def _between_seeds(
    pipe: LatentPipeline, a: int, b: int, w: Tensor, prompt: str, options: Mapping[str, Any]
) -> Images:
    n, stage = len(w), pipe.stage
    call = pipe.settle([prompt] * n, **{**options, "seed": [a] * (n - 1) + [b]})
    first, last = (stage.noise(replace(call, seeds=(end,))) for end in (a, b))
    call = replace(call, latents=slerp(first, last, w.to(stage.device)))
    return pipe.draw(call, Request(task="interpolate", facts={"seed": [a, b], "n": n}))


@torch.no_grad()
def _between_images(
    pipe: LatentPipeline,
    a: ImageInput,
    b: ImageInput,
    w: Tensor,
    prompt: str,
    options: Mapping[str, Any],
) -> Images:
    """Draw images on the arcs between the states that two images are inverted to.

    Without a prompt, a model that drafts has the mean of the images' latents as its draft.
    """
    sides = [to_pixels(a), to_pixels(b)]
    if sides[0].shape != sides[1].shape or len(sides[0]) != 1:
        raise ValueError(
            f"a and b: expected two images of one size, got {[tuple(side.shape) for side in sides]}"
        )
    ends, seeds = torch.cat(sides), tuple(options["seed"])
    guidance = 1.0 if options.get("guidance") is None else options["guidance"]
    asked = {**options, "guidance": guidance, "seed": seeds[:2]}
    two = invert(pipe, ends, source=prompt, prompt=prompt, **asked)
    call = replace(two.call, prompts=(prompt,) * len(w), seeds=seeds)
    arcs = [slerp(track[:1], track[1:], w.to(track)) for track in two.tracks]
    draft = pipe.image_draft(ends, prompted=bool(prompt))
    if draft is not None:
        first, last = draft.latent[:1], draft.latent[1:]
        draft = Known(torch.lerp(first, last, w.to(first).view(-1, 1, 1, 1)), draft.hole)
    path = replace(two, call=call, tracks=arcs)
    return draw_inverted(pipe, "interpolate", path, unguided(pipe, call, draft), {"n": len(w)})


def embedding_interpolate(
    pipe: EmbeddingPipeline,
    a: Any,
    b: Any,
    *,
    n: int = 8,
    seed: int = 0,
    prompt: str = "",
    invert: bool = False,
    **options: Any,
) -> Images:
    """Draw images on the arc between two image embeddings, both ends included (Ramesh et al. 2022, sec. 3.2).

    Args:
        a, b: The ends: each a text, whose embedding the prior makes, or an image (a path as a `Path`).
        n: Number of images, at least 2.
        seed: Seed of all images.
        prompt: Text for the decoder, the same for all images.
        invert: Between two images of one size, go from the inverted noise of one to that of the other as
            well.
        options: Options of `text_to_image`.

    Raises:
        ValueError: If `n` is below 2, or images differ in size.
    """
    check_path_count(n)
    shared = {**options, "seed": [seed] * n}
    call = pipe.settle([prompt] * n, n=1, **shared)
    sides = [to_pixels(side) for side in (a, b)] if invert else []
    if invert:
        if sides[0].shape != sides[1].shape:
            raise ValueError(
                f"invert: expected two images of one size, got {[tuple(side.shape) for side in sides]}"
            )
        call = inverting_call(pipe, [prompt] * n, sides[0], {**shared, "n": 1}, eta=0.0)
    ends = [pipe.embed(side, seed=seed, **prior_options(options)) for side in (a, b)]
    w = torch.linspace(0, 1, n, device="cpu", dtype=torch.float32)
    path = replace(ends[0], vector=slerp(ends[0].vector, ends[1].vector.to(ends[0].vector.device), w))
    if invert:
        noises = [invert_embedding(pipe, call, pixels, end) for pixels, end in zip(sides, ends, strict=True)]
        call = replace(call, latents=slerp(noises[0], noises[1], w.to(noises[0].device)))
    image = torch.lerp(sides[0], sides[1], w.to(sides[0]).view(-1, 1, 1, 1)) if invert else None
    named = [side for side in (a, b) if isinstance(side, str)]
    facts = {"invert": invert}
    return draw_embeddings(
        pipe, "interpolate", call, path, enlarge=not invert, facts=facts, image=image, named=named
    )
