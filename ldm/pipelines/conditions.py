"""What the network is told in a call: texts or classes, SDXL's vector of sizes, and channels beside the latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ldm.cards import ModelCard
from ldm.images import Images
from ldm.models.conditioner import Conditioner, TextConditioner
from ldm.models.labels import LabelConditioner
from ldm.nn.embeddings import vector_condition
from ldm.pipelines.call import Call, SizeCondition
from ldm.types import Cond, Denoised

Pair = tuple[Cond, Cond]  # conditional, of batch B; unconditional, of batch 1 or B


class Watcher(Protocol):
    """What is told of a run: its call, its conditions, every step (the state behind it, and the prediction it took), and its pictures."""

    def begin(self, call: Call) -> None: ...

    def told(self, pair: Pair) -> None: ...

    def step(self, i: int, x: Tensor, d: Denoised) -> None: ...

    def end(self, images: Images) -> None: ...


def conditions(card: ModelCard, text: Conditioner | None, call: Call, size: tuple[int, int]) -> Pair:
    """The conditions of a call's prompts or classes, where the latent has a ``size`` (h, w); ValueError for a prompt of a kind not taken."""
    if isinstance(text, LabelConditioner):
        return _classes(card, text, call)
    if any(not isinstance(prompt, str) for prompt in call.prompts):
        raise ValueError(f"{card.name!r} is not conditioned on classes, expected a text, got {call.prompts[0]!r}")
    if text is None:
        if any(call.prompts) or call.negative or call.guidance != 1:
            raise ValueError(f"{card.name!r} is conditioned on no text: expected an empty prompt and guidance 1")
        return Cond(), Cond()
    prompts = [str(prompt) for prompt in call.prompts]
    if isinstance(text, TextConditioner):
        cond, uncond = text(prompts, size), text([call.negative], size)
    else:
        cond, uncond = text(prompts), text([call.negative])
    if card.zero_negative and not call.negative:
        uncond = uncond.map(lambda value: torch.zeros_like(value) if value.is_floating_point() else value)
    if card.vector is None:
        return cond, uncond
    return with_sizes(card, cond, call), with_sizes(card, uncond, call, negative=True)


def _classes(card: ModelCard, labels: LabelConditioner, call: Call) -> Pair:
    wanted = [prompt for prompt in call.prompts if isinstance(prompt, int)]
    if len(wanted) != len(call.prompts):
        raise ValueError(f"{card.name!r} is conditioned on classes: expected a number from 0 to {labels.config.classes - 1}, got {call.prompts[0]!r}")
    cond = labels(wanted)
    if card.null_class is not None:
        return cond, labels([card.null_class])
    if call.guidance != 1:
        raise ValueError(f"{card.name!r} knows no unconditional class: expected guidance 1, got {call.guidance}")
    return cond, cond


def with_sizes(card: ModelCard, cond: Cond, call: Call, *, negative: bool = False) -> Cond:
    """The condition with SDXL's vector: the pooled text, then the sinusoids of the sizes (and, in the refiner, of the score)."""
    sizes: SizeCondition = call.sizes
    own = (call.height, call.width)
    last: Sequence[float] = sizes.target or own
    if card.vector == "aesthetic":
        last = (sizes.negative_aesthetic if negative else sizes.aesthetic,)
    assert cond.pooled is not None
    numbers = torch.tensor([[*(sizes.original or own), *sizes.crop, *last]], dtype=torch.float32, device=cond.pooled.device)
    return replace(cond, pooled=vector_condition(cond.pooled, numbers.expand(len(cond.pooled), -1)))


def joined(pair: Pair, n: int, *, concat: Tensor | None = None, pooled: Tensor | None = None) -> Pair:
    """Both conditions at batch n, with channels beside x_t, (B or 1, C', h, w), and levels (n,) where given."""

    def join(cond: Cond) -> Cond:
        fields = {"concat": None if concat is None else concat.expand(n, *concat.shape[1:]), "pooled": pooled}
        return replace(cond.expand(n), **{name: value for name, value in fields.items() if value is not None})

    return join(pair[0]), join(pair[1])
