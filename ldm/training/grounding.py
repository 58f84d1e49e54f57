"""Teaching cross-attention to lie where the thing is drawn that a word names, so that maps can be read
(FastComposer, Xiao et al. 2023, 4.3)."""

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
from ldm.data import Composition
from ldm.data.captions import CaptionPieces, join_captions
from ldm.data.compose import coverage
from ldm.models.layers.attention import Attention, AttentionBlock, attention_control
from ldm.training.config import at_least

LEAST = 0.01  # of a picture: what covers less of it is not looked for


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """``weight``: that of `grounding_loss` beside the diffusion's; ``only``: whether nothing learns but
    cross-attention's queries and keys, which say where it looks."""

    weight: float
    only: bool = False

    def __post_init__(self) -> None:
        at_least(0, weight=self.weight)


@dataclass(frozen=True, eq=False)
class Named:
    """What words of a caption name: the ``sample`` of the batch, the places of the words' tokens, and the
    ``area`` (H, W) in [0, 1] of the thing."""

    sample: int
    places: list[int]
    area: Tensor


def named(
    said: Sequence[CaptionPieces],
    compositions: Sequence[Composition],
    pictures: np.ndarray,
    text: TextConditioner,
    size: int,
) -> list[Named]:
    """All that captions, given in pieces, name of the areas of their compositions; an empty caption names
    nothing."""
    found = []
    for sample, (pieces, caption, composition) in enumerate(
        zip(said, join_captions(said), compositions, strict=True)
    ):
        owners = [area for piece, area in pieces for _ in text.places(piece)]
        there = text.places(caption)
        shown = coverage(composition, pictures, size) if any(owners) else {}
        for area, pixels in shown.items():
            places = [
                place for owner, (_, own) in zip(owners, there, strict=True) if owner == area for place in own
            ]
            if places and pixels.mean() >= LEAST:
                found.append(Named(sample, places, torch.from_numpy(pixels)))
    return found


def grounding_loss(maps: Iterable[Tensor], wanted: Sequence[Named]) -> Tensor:
    """The mean over attentions and named things of KL(area ‖ attention), both made distributions over
    positions, in nats: 0 where they are alike.

    ``maps``: probabilities (B, L, M) of each cross-attention, L the positions of a square. The attention to a
    thing is the sum over its tokens.
    """
    if not wanted:
        return torch.zeros(())
    samples, areas = [one.sample for one in wanted], torch.stack([one.area for one in wanted])[:, None]
    losses = []
    for probabilities in maps:
        positions, tokens = probabilities.shape[1:]
        side = math.isqrt(positions)
        chosen = torch.zeros(len(wanted), tokens)
        for row, one in zip(chosen, wanted, strict=True):
            row[one.places] = 1
        # (N, L)
        seen = (
            (probabilities[samples].float() * chosen[:, None].to(probabilities.device))
            .sum(-1)
            .clamp_min(1e-12)
        )
        target = F.adaptive_avg_pool2d(areas, side).flatten(1).to(seen)
        target = target / target.sum(1, keepdim=True)
        losses.append(
            (torch.xlogy(target, target) - target * (seen / seen.sum(1, keepdim=True)).log()).sum(1).mean()
        )
    return torch.stack(losses).mean()


@contextmanager
def attended(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, by their names, the probabilities (B, L, M) of a network's cross-attentions at its last
    call: means over heads, with gradients."""
    maps: dict[str, Tensor] = {}

    def keep(name: str, probabilities: Tensor) -> None:
        maps[name] = reduce(probabilities, "b heads l m -> b l m", "mean")

    with attention_control(network, keep):
        yield maps


def learn_where_to_look(network: nn.Module) -> None:
    """Leave nothing of a network to be learnt but the queries and keys of its cross-attentions."""
    network.requires_grad_(False)
    for part in network.modules():
        if isinstance(part, Attention) and part.cross:
            part.to_q.requires_grad_(True)
            # of the context
            (part.add_k_proj if isinstance(part, AttentionBlock) else part.to_k).requires_grad_(True)
