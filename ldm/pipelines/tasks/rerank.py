"""Reranking: the images most similar to their prompt by CLIP."""

from __future__ import annotations

from dataclasses import replace

from ldm.conditioning.clip import ClipPair
from ldm.images.result import Images


def rerank(images: Images, clip: ClipPair, *, keep: int = 1) -> Images:
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
    )
