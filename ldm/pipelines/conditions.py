"""The conditions of a call: of texts or classes, SDXL's sizes, and channels joined to x_t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldm.catalog.cards import ModelCard
from ldm.conditioning.conditioner import Conditioner
from ldm.diffusion.cond import Cond
from ldm.models.labels import LabelConditioner
from ldm.models.layers.embeddings import vector_condition
from ldm.pipelines.call import Call
from ldm.pipelines.windows import Crop

Pair = tuple[Cond, Cond]  # conditional, of batch B; unconditional, of batch 1 or B


def prompt_conditions(
    card: ModelCard,
    text: Conditioner | LabelConditioner | None,
    call: Call,
    size: tuple[int, int],
    *,
    both: bool = True,
) -> Pair:
    """Return the conditions of a call's prompts or classes.

    Args:
        card: The model's card.
        text: What turns prompts or classes into conditions; None in an unconditional model.
        call: The call.
        size: (h, w) of the latent, for models that draft it.
        both: Whether the unconditional condition of texts is wanted. Without it, the conditional one stands
            in its place, and the empty text is not read. Default: True.

    Raises:
        ValueError: If the prompts are of a kind that the model does not take.
    """
    if isinstance(text, LabelConditioner):
        return _class_conditions(card, text, call)
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
    cond = text(call.texts, size=size, seeds=call.seeds)
    uncond = text(call.negatives, size=size, seeds=call.seeds) if both else cond
    if card.zero_negative and both:
        uncond = zero_where_empty(uncond, call.negatives)
    if card.vector is None:
        return cond, uncond
    return with_sizes(card, cond, call), with_sizes(card, uncond, call, negative=True)


def _class_conditions(card: ModelCard, labels: LabelConditioner, call: Call) -> Pair:
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


def zero_where_empty(cond: Cond, texts: Sequence[str]) -> Cond:
    """Return a condition that is zero for empty texts."""
    kept = torch.tensor([bool(text) for text in texts], device="cpu")

    def zeroed(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value * kept.to(value).reshape(-1, *[1] * (value.ndim - 1))

    return cond.map(zeroed)


def with_sizes(card: ModelCard, cond: Cond, call: Call, *, negative: bool = False) -> Cond:
    """Return a condition with SDXL's vector: the pooled text, then the sinusoids of the sizes.

    Args:
        card: The model's card; the refiner's has the aesthetic score in place of the target size.
        cond: The text's condition.
        call: The call, which states the sizes.
        negative: Whether this is the unconditional branch.
    """
    sizes, own = call.sizes, (call.height, call.width)
    last: Sequence[float] = sizes.target or own
    if card.vector == "aesthetic":
        last = (sizes.negative_aesthetic if negative else sizes.aesthetic,)
    assert cond.pooled is not None
    values = [[*(sizes.original or own), *sizes.crop, *last]]
    numbers = torch.tensor(values, dtype=torch.float32, device=cond.pooled.device)
    return replace(cond, pooled=vector_condition(cond.pooled, numbers.expand(len(cond.pooled), -1)))


def expanded_pair(pair: Pair, n: int, *, concat: Tensor | None = None, pooled: Tensor | None = None) -> Pair:
    """Return both conditions at batch size n.

    Args:
        pair: The conditions.
        n: Number of images.
        concat: Channels joined to x_t, (B or 1, C', h, w), which are set in both.
        pooled: Levels (n,), which are set in both.
    """

    def expanded(cond: Cond) -> Cond:
        fields: dict[str, Tensor | None] = {
            "concat": None if concat is None else concat.expand(n, *concat.shape[1:]),
            "pooled": pooled,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return Cond.of({**dict(cond.expand(n).items()), **given})

    return expanded(pair[0]), expanded(pair[1])


def crop_condition(cond: Cond, crop: Crop, size: tuple[int, int]) -> Cond:
    """Return the condition of a window of a state (h, w).

    Channels of the state's size are cropped. Others, such as a draft of a window's size, serve each window.
    Of the canvas of exemplars, which covers the whole state, the window's part is cut out.
    """
    if cond.exemplars is not None:
        cell = cond.exemplars.shape[-2] // size[0]
        rows, columns = (slice(part.start * cell, part.stop * cell) for part in crop[1:])
        cond = replace(cond, exemplars=cond.exemplars[..., rows, columns])
    if cond.concat is None or tuple(cond.concat.shape[-2:]) != size:
        return cond
    return replace(cond, concat=cond.concat[crop])


def between_conditions(a: Cond, b: Cond, w: Tensor) -> Cond:
    """Return conditions on the straight line from one to another, each of batch size 1.

    Where only one has a token, the last token of the other takes its place. The ends are exact.

    Args:
        a, b: The conditions at weight 0 and 1.
        w: Weights (B,) in [0, 1].
    """
    fields: dict[str, Tensor] = {}
    others = dict(b.items())
    for name, first in a.items():
        second = others[name]
        if name == "context":
            first, second = _with_last_token_repeated(a), _with_last_token_repeated(b)
        if name == "context_mask":
            weight = w.to(first.device)[:, None]
            fields[name] = torch.where(weight == 0, first, torch.where(weight == 1, second, first | second))
        elif first.is_floating_point():
            weight = w.to(first).reshape(-1, *[1] * (first.ndim - 1))
            fields[name] = torch.where(weight == 1, second, torch.lerp(first, second, weight))
        else:
            fields[name] = first.expand(len(w), *first.shape[1:])
    return Cond.of(fields)


def _with_last_token_repeated(cond: Cond) -> Tensor:
    """Return the context (1, L, D) with masked tokens replaced by the last unmasked one."""
    assert cond.context is not None
    if cond.context_mask is None:
        return cond.context
    last = int(cond.context_mask[0].nonzero().max())
    return torch.where(cond.context_mask[..., None], cond.context, cond.context[:, last : last + 1])


def crop_hints(cond: Cond, crop: Crop, size: tuple[int, int]) -> Cond:
    """Return the condition with the hints of a window of a state (h, w), those that have the state's size."""

    def cropped(name: str, value: Tensor) -> Tensor:
        is_map = name.startswith("hints.") and value.ndim == 4 and tuple(value.shape[-2:]) == size
        return value[crop] if is_map else value

    return cond if cond.hints is None else cond.of({name: cropped(name, v) for name, v in cond.items()})
