"""Reranking: the images most similar to their prompt by CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from ldm.images.result import Images
from ldm.support.scalars import whole_number


class Ranker(Protocol):
    """What ranks images by their prompts: a `ClipPair` with both towers, or the features of a CLIP."""

    def similarity(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image (B, 3, H, W) in [0, 1] and its prompt, shape (B,)."""


def best_by_clip(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    clip: Ranker | None = None,
    of: int = 16,
    keep: int = 4,
    **options: Any,
) -> Images:
    """Draw `of` images of each prompt and return the `keep` most similar to it by CLIP, best first.

    Args:
        prompt: One prompt or several.
        clip: Both towers of a CLIP, such as the `clip` of an `UnCLIP`, or features of `ldm.analysis.metrics`.
            Default: the pipeline's `clip`.
        of: Number of images of each prompt that are drawn.
        keep: Number of them that are returned.
        options: Options of `text_to_image`.

    Raises:
        ValueError: If there is no CLIP, or an option is wrong.
    """
    ranker = pipe.clip if clip is None else clip
    if ranker is None:
        raise ValueError(f"{pipe.name!r} has no CLIP of its own to rank images by: pass clip")
    keep = whole_number("keep", keep, least=1, most=whole_number("of", of, least=1))
    return rerank(pipe.text_to_image(prompt, n=of, **options), ranker, keep=keep)


def rerank(images: Images, clip: Ranker, *, keep: int = 1) -> Images:
    """Return the images of each prompt that are most similar to it by CLIP, best first.

    The score is the cosine of the image's and the text's embedding (Ramesh et al. 2021, section 2.6).

    Args:
        images: Images of one prompt or several.
        clip: Both towers of a CLIP.
        keep: Number of images kept of each prompt.

    Raises:
        ValueError: If a prompt has fewer images than that.
    """
    scores = clip.similarity(images.tensor, images.prompts).cpu()
    chosen: list[int] = []
    for prompt in dict.fromkeys(images.prompts):
        own = [i for i, p in enumerate(images.prompts) if p == prompt]
        if not 1 <= keep <= len(own):
            raise ValueError(f"keep: expected 1 to {len(own)}, the images of {prompt!r}, got {keep}")
        chosen += sorted(own, key=lambda i: -float(scores[i]))[:keep]
    recipe = {
        **images.recipe,
        "replayable": False,
        "reranked": {"of": len(images.tensor), "scores": [round(float(scores[i]), 4) for i in chosen]},
    }
    flagged = None if images.flagged is None else tuple(images.flagged[i] for i in chosen)
    return replace(
        images,
        tensor=images.tensor[chosen],
        seeds=tuple(images.seeds[i] for i in chosen),
        prompts=tuple(images.prompts[i] for i in chosen),
        recipe=recipe,
        flagged=flagged,
        steps=None if images.steps is None else images.steps[:, chosen],
    )
