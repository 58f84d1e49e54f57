"""What the network is told in a call: texts or classes, SDXL's vector of sizes, and channels beside the
latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.catalog.cards import ModelCard
from ldm.conditioning.conditioner import Conditioner, TextConditioner
from ldm.diffusion.cond import Cond
from ldm.diffusion.interfaces import Denoised
from ldm.images.canvas import fill_hole
from ldm.images.result import Images
from ldm.models.draft import Draft
from ldm.models.labels import LabelConditioner
from ldm.models.layers.embeddings import vector_condition
from ldm.pipelines.call import Call, SizeCondition
from ldm.pipelines.windows import Crop

Pair = tuple[Cond, Cond]  # conditional, of batch B; unconditional, of batch 1 or B


class Watcher(Protocol):
    """What is told of a run: its call, its conditions, every step (the state behind it, and the prediction it
    took), and its pictures."""

    def begin(self, call: Call) -> None: ...

    def told(self, pair: Pair) -> None: ...

    def step(self, i: int, x: Tensor, d: Denoised) -> None: ...

    def end(self, images: Images) -> None: ...


def conditions(card: ModelCard, text: Conditioner | None, call: Call, size: tuple[int, int]) -> Pair:
    """The conditions of a call's prompts or classes, where the latent has a ``size`` (h, w); ValueError for a
    prompt of a kind not taken."""
    if isinstance(text, LabelConditioner):
        return _classes(card, text, call)
    if any(not isinstance(prompt, str) for prompt in call.prompts):
        raise ValueError(
            f"{card.name!r} is not conditioned on classes, expected a text, got {call.prompts[0]!r}"
        )
    if text is None:
        if any(call.prompts) or any(call.negatives) or call.guidance != 1:
            raise ValueError(
                f"{card.name!r} is conditioned on no text: expected an empty prompt and guidance 1"
            )
        return Cond(), Cond()
    prompts = [str(prompt) for prompt in call.prompts]
    if isinstance(text, TextConditioner):
        cond, uncond = text(prompts, size), text(call.negatives, size)
    else:
        cond, uncond = text(prompts), text(call.negatives)
    if card.zero_negative:
        kept = torch.tensor([bool(negative) for negative in call.negatives])
        uncond = uncond.map(
            lambda value: (
                value * kept.to(value).reshape(-1, *[1] * (value.ndim - 1))
                if value.is_floating_point()
                else value
            )
        )
    if card.vector is None:
        return cond, uncond
    return with_sizes(card, cond, call), with_sizes(card, uncond, call, negative=True)


def _classes(card: ModelCard, labels: LabelConditioner, call: Call) -> Pair:
    wanted = [prompt for prompt in call.prompts if isinstance(prompt, int)]
    if len(wanted) != len(call.prompts):
        raise ValueError(
            f"{card.name!r} is conditioned on classes: expected a number from 0 to"
            f" {labels.config.classes - 1}, got {call.prompts[0]!r}"
        )
    cond = labels(wanted)
    if card.null_class is not None:
        return cond, labels([card.null_class])
    if call.guidance != 1:
        raise ValueError(
            f"{card.name!r} knows no unconditional class: expected guidance 1, got {call.guidance}"
        )
    return cond, cond


def with_sizes(card: ModelCard, cond: Cond, call: Call, *, negative: bool = False) -> Cond:
    """The condition with SDXL's vector: the pooled text, then the sinusoids of the sizes (and, in the
    refiner, of the score)."""
    sizes: SizeCondition = call.sizes
    own = (call.height, call.width)
    last: Sequence[float] = sizes.target or own
    if card.vector == "aesthetic":
        last = (sizes.negative_aesthetic if negative else sizes.aesthetic,)
    assert cond.pooled is not None
    numbers = torch.tensor(
        [[*(sizes.original or own), *sizes.crop, *last]], dtype=torch.float32, device=cond.pooled.device
    )
    return replace(cond, pooled=vector_condition(cond.pooled, numbers.expand(len(cond.pooled), -1)))


def expanded_pair(pair: Pair, n: int, *, concat: Tensor | None = None, pooled: Tensor | None = None) -> Pair:
    """Both conditions at batch n, with channels beside x_t, (B or 1, C', h, w), and levels (n,) where
    given."""

    def join(cond: Cond) -> Cond:
        fields = {"concat": None if concat is None else concat.expand(n, *concat.shape[1:]), "pooled": pooled}
        return replace(cond.expand(n), **{name: value for name, value in fields.items() if value is not None})

    return join(pair[0]), join(pair[1])


def cut(cond: Cond, part: Crop, size: tuple[int, int]) -> Cond:
    """The condition of a window of a latent (h, w): channels of the latent's size are cut, those of a
    window's, a draft of the text, serve each."""
    if cond.concat is None or tuple(cond.concat.shape[-2:]) != size:
        return cond
    return replace(cond, concat=cond.concat[part])


def between_conditions(a: Cond, b: Cond, w: Tensor) -> Cond:
    """Conditions on straight lines from one to another, each of batch 1, at weights w (B,) in [0, 1].

    Where only one has a token, the other's last one stands for it; at the ends, each is as it is.
    """
    fields: dict[str, Tensor] = {}
    for name, first in a.items():
        second = getattr(b, name)
        if name == "context":
            first, second = _last_repeated(a), _last_repeated(b)
        if name == "context_mask":
            weight = w.to(first.device)[:, None]
            fields[name] = torch.where(weight == 0, first, torch.where(weight == 1, second, first | second))
        elif first.is_floating_point():
            weight = w.to(first).reshape(-1, *[1] * (first.ndim - 1))
            fields[name] = torch.where(weight == 1, second, torch.lerp(first, second, weight))
        else:
            fields[name] = first.expand(len(w), *first.shape[1:])
    return Cond(**fields)


def _last_repeated(cond: Cond) -> Tensor:
    """The context (1, L, D) with what the mask leaves out replaced by the last token that it does not."""
    assert cond.context is not None
    if cond.context_mask is None:
        return cond.context
    last = int(cond.context_mask[0].nonzero().max())
    return torch.where(cond.context_mask[..., None], cond.context, cond.context[:, last : last + 1])


def drafted(pair: Pair, known: Tensor, hole: Tensor, draft: Draft | None = None) -> Pair:
    """Both conditions with what is known (B or 1, C, h, w) outside the hole (1 or B, 1, h, w) in place of the
    text's draft, where there is one.

    A draft is the mean of the latent given the text; given a part of the latent too, that part is its own
    mean, and the rest is drafted again to agree with it (`Draft.agreeing`; by ``draft``, where the condition
    has the text's embedding). A draft smaller than the latent is laid over the known part once, and continued
    smoothly around it.
    """

    def correct(cond: Cond, again: bool) -> Cond:
        if cond.concat is None:
            return cond
        drawn, open_ = cond.concat, hole.to(cond.concat)
        th, tw = drawn.shape[-2:]
        h, w = open_.shape[-2:]
        top = anchor((open_ == 0).any(dim=-1).flatten(0, 1).any(dim=0), th)
        left = anchor((open_ == 0).any(dim=-2).flatten(0, 1).any(dim=0), tw)
        room = (left, w - tw - left, top, h - th - top)
        part = (..., slice(top, top + th), slice(left, left + tw))
        if (
            again
            and draft is not None
            and cond.pooled is not None
            and (th, tw) == (draft.config.size,) * 2
            and 0 < float(open_[part].mean()) < 1
        ):
            n = len(cond.pooled)
            drawn = draft.agreeing(
                cond.pooled, known[part].expand(n, -1, -1, -1), open_[part].expand(n, -1, -1, -1)
            ).to(drawn)
        # (B, 1, h, w) what neither says
        bare = F.pad(torch.zeros_like(drawn[:, :1]), room, value=1.0) * open_
        whole = torch.where(open_ > 0, F.pad(drawn, room), known.to(drawn))
        return replace(cond, concat=fill_hole(whole, bare))

    return correct(pair[0], True), correct(pair[1], False)


def anchor(known: Tensor, tile: int) -> int:
    """Where a window begins along a side of which some is known (n,) bool: it holds all of that, or lies in
    it, as near to the middle as can be."""
    side, where = len(known), known.nonzero().flatten().tolist()
    low, high = (where[-1] + 1 - tile, where[0]) if where else (0, side - tile)
    middle = (side - tile) // 2
    return min(max(min(max(middle, min(low, high)), max(low, high)), 0), side - tile)
