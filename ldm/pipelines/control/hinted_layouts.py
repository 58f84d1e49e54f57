"""Layouts of exemplars that agree with a hint of edges.

A control adds to what the network computes, but a model with exemplars draws its things where their layout
says. Where a call has a control whose hints show edges, the layout is therefore drawn from its posterior,
p(layout | text)·p(hint | layout): candidates of the prior are compared by the agreement of the hint with the
edges of the exemplars that are placed so. The best ones are displaced and compared again, by ever less, at
ever finer scales. Exemplars that the prompt leaves open are chosen in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.exemplars import ExemplarConditioner, PlacedThings
from ldm.diffusion.cond import Cond
from ldm.models.layout import ThingLayout, place_exemplars
from ldm.pipelines.call import Call
from ldm.pipelines.layouts import derived_seed, displaced

HINTED_CANDIDATES = 32
SLOPE = 0.1  # of colours and opacity in [0, 1] from one pixel to the next, at which a line is half visible


@dataclass(frozen=True, kw_only=True)
class HintRound:
    """One comparison of candidates.

    Args:
        tries: Number of displaced copies of each candidate, which are compared too.
        spread: Their displacement, as a fraction of the canvas.
        best: Number of candidates that are kept.
        shrunk: The canvas has 1/`shrunk` of the hint's height and width.
        blur: Standard deviation of the blur of lines, in pixels of that canvas.
    """

    tries: int
    spread: float
    best: int
    shrunk: int
    blur: float


HINTED_ROUNDS = (
    HintRound(tries=4, spread=0.12, best=16, shrunk=4, blur=1.0),
    HintRound(tries=4, spread=0.06, best=12, shrunk=2, blur=1.2),
    HintRound(tries=5, spread=0.03, best=8, shrunk=2, blur=0.8),
    HintRound(tries=8, spread=0.015, best=4, shrunk=2, blur=0.6),
    HintRound(tries=6, spread=0.006, best=2, shrunk=1, blur=0.7),
    HintRound(tries=12, spread=0.003, best=1, shrunk=1, blur=0.7),
)


def hinted_conditions(text: ExemplarConditioner, call: Call, size: tuple[int, int]) -> Cond | None:
    """Return the conditions of a call's B prompts, each in the layout that agrees with the call's hints.

    Args:
        text: The conditioner.
        call: The call.
        size: (h, w) of the latent.

    Returns:
        None if no control of the call shows edges from the first step on.
    """
    uses = [use for use in call.controls if use.shows_edges]
    if not uses:
        return None
    shape = (len(call.seeds), 1, *uses[0].hint.shape[-2:])
    most = max(use.option.strength for use in uses)
    hints = [use.option.strength / most * use.hint.mean(1, keepdim=True).expand(shape) for use in uses]
    lines = torch.stack(hints).sum(0).clamp(0, 1)  # (B, 1, H, W)
    conds = [
        hinted_condition(text, prompt, seed, lines[i : i + 1], size)
        for i, (prompt, seed) in enumerate(zip(call.texts, call.seeds, strict=True))
    ]
    return Cond.cat(conds)


@torch.no_grad()
def hinted_condition(
    text: ExemplarConditioner, prompt: str, seed: int, lines: Tensor, size: tuple[int, int]
) -> Cond:
    """Return the condition of a prompt, in the layout whose edges agree with a hint best.

    Args:
        text: The conditioner.
        prompt: The prompt.
        seed: Seed of the candidates.
        lines: The hint: brighter where an edge is, in [0, 1], (1, 1, H, W).
        size: (h, w) of the latent.

    Returns:
        A condition of batch size 1. Where the prompt names nothing, or the hint is empty, it is the seed's.
    """
    read, lines = text.read(prompt), lines.to(text.device, torch.float32)
    if not read.things or not bool(lines.any()):
        return text.condition(read, text.draw_things([read], [seed]), size)
    seeds = [seed, *(derived_seed(seed, i) for i in range(1, HINTED_CANDIDATES))]
    best, drawn = text.draw_things([read] * HINTED_CANDIDATES, seeds), 0
    for each in HINTED_ROUNDS:
        draws = range(drawn, drawn + each.tries * len(best))
        tried = [displaced(best[draw % len(best)], each.spread, seed, draw) for draw in draws]
        best, drawn = [*best, *tried], draws.stop
        agreement = _agreement(best, read.things, lines, each)
        best = [best[i] for i in agreement.argsort(descending=True)[: each.best].tolist()]
    return text.condition(read, best[:1], size)


def _agreement(candidates: Sequence[PlacedThings], things: int, lines: Tensor, at: HintRound) -> Tensor:
    """Return the cosine of a hint (1, 1, H, W) with the edges of each of N candidates, (N,)."""
    size = (lines.shape[-2] // at.shrunk, lines.shape[-1] // at.shrunk)
    images = torch.cat([each.images[:, :things] for each in candidates])  # (N, K', 4, S, S)
    canvas = place_exemplars(images, ThingLayout.cat([each.layout for each in candidates]), size)
    wanted = blurred(F.interpolate(lines, size, mode="area"), at.blur)  # (1, 1, H', W')
    shown = blurred(edges(canvas.flatten(1, 2)), at.blur)  # (N, 1, H', W')
    return F.cosine_similarity(shown.flatten(1), wanted.flatten(1), dim=1)


def edges(canvas: Tensor) -> Tensor:
    """Return how visible a line is at each pixel of images (N, C, H, W), (N, 1, H, W) in [0, 1).

    It is s²/(s² + c²) for the slope s, the root of the sum over channels of central differences squared.
    """
    padded = F.pad(canvas, (1, 1, 1, 1))
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    square = (across.square() + down.square()).sum(1, keepdim=True)  # (N, 1, H, W)
    return square / (square + SLOPE**2)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Return images (N, 1, H, W) behind a Gaussian of standard deviation `sigma` pixels."""
    reach = round(3 * sigma)
    x = torch.arange(-reach, reach + 1, dtype=torch.float32, device=image.device)
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    image = F.conv2d(image, kernel.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(image, kernel.view(1, 1, -1, 1), padding=(reach, 0))
