"""Grounding of cross-attention: a word attends to the place where the thing that it names is drawn.

FastComposer, Xiao et al. 2023, section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.data import Scene
from ldm.data.captions import CaptionPieces, join_captions
from ldm.data.rendering import coverage
from ldm.models.layers.attention import Attention, AttentionBlock, attention_control
from ldm.training.config import check_at_least

LEAST_COVERAGE = 0.01  # things that cover less of an image are ignored


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """How grounding is trained.

    Args:
        weight: Weight of the mean of `grounding_losses` beside the diffusion loss, at least 0.
        only: Whether only the queries and keys of cross-attention are trained. Default: False.
    """

    weight: float
    only: bool = False

    def __post_init__(self) -> None:
        check_at_least(0, weight=self.weight)


@dataclass(frozen=True, eq=False, kw_only=True)
class NamedArea:
    """The tokens of a caption that name a thing, and the area that the thing covers.

    Args:
        sample: Index of the sample in the batch.
        tokens: Positions of the tokens in the context.
        area: Coverage of each pixel, (H, W) in [0, 1].
    """

    sample: int
    tokens: list[int]
    area: Tensor


def find_named_areas(
    captions: Sequence[CaptionPieces],
    scenes: Sequence[Scene],
    images: np.ndarray,
    text: TextConditioner,
    size: int,
) -> list[NamedArea]:
    """Find the things that captions name, with their tokens and areas.

    Args:
        captions: Captions in pieces, B; an empty one names nothing.
        scenes: What they describe, B.
        images: The images of the data set, (N, P, P, 4) uint8.
        text: Places the words of a caption in the context.
        size: Side of the areas in pixels.
    """
    found = []
    for sample, (pieces, caption, scene) in enumerate(
        zip(captions, join_captions(captions), scenes, strict=True)
    ):
        word_areas = [piece.area for piece in pieces for _ in text.places(piece.text)]
        word_tokens = [tokens for _, tokens in text.places(caption)]
        areas = coverage(scene, images, size) if any(word_areas) else {}
        for area, pixels in areas.items():
            tokens = [
                token
                for word_area, positions in zip(word_areas, word_tokens, strict=True)
                if word_area == area
                for token in positions
            ]
            if tokens and pixels.mean() >= LEAST_COVERAGE:
                found.append(NamedArea(sample=sample, tokens=tokens, area=torch.from_numpy(pixels)))
    return found


def grounding_losses(maps: Iterable[Tensor], named: Sequence[NamedArea]) -> Tensor:
    """Compute KL(area ‖ attention) of each named thing, the mean over the attentions, in nats.

    Both are normalised to distributions over positions. The attention to a thing is the sum over its tokens.

    Args:
        maps: Probabilities of each cross-attention, (B, L, M), with L the positions of a square.
        named: The named things of the batch.

    Returns:
        The losses, (N,); 0 where attention and area have the same shape.
    """
    if not named:
        return torch.zeros(0, device="cpu", dtype=torch.float32)
    samples, areas = [one.sample for one in named], torch.stack([one.area for one in named])[:, None]
    losses = []
    for probabilities in maps:
        positions, tokens = probabilities.shape[1:]
        side = math.isqrt(positions)
        chosen = torch.zeros(len(named), tokens, device="cpu", dtype=torch.float32)
        for row, one in zip(chosen, named, strict=True):
            row[one.tokens] = 1
        attention = probabilities[samples].float() * chosen[:, None].to(probabilities.device)  # (N, L, M)
        attention = attention.sum(-1).clamp_min(1e-12)  # (N, L)
        attention = attention / attention.sum(1, keepdim=True)
        target = F.adaptive_avg_pool2d(areas, side).flatten(1).to(attention)
        target = target / target.sum(1, keepdim=True)
        losses.append((torch.xlogy(target, target) - target * attention.log()).sum(1))  # (N,)
    return torch.stack(losses).mean(0)


@contextmanager
def record_attention(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the probabilities (B, L, M) of a network's cross-attentions in a call inside the context.

    The maps are means over heads and carry gradients; a second call overwrites those of the first.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str, probabilities: Tensor) -> None:
        maps[name] = reduce(probabilities, "b heads l m -> b l m", "mean")

    with attention_control(network, keep):
        yield maps


def freeze_all_but_cross_attention(network: nn.Module) -> None:
    """Freeze a network except for the queries and keys of its cross-attentions."""
    network.requires_grad_(False)
    for part in network.modules():
        if isinstance(part, Attention) and part.cross:
            part.to_q.requires_grad_(True)
            # the keys of the context
            (part.add_k_proj if isinstance(part, AttentionBlock) else part.to_k).requires_grad_(True)
