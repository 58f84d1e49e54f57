"""Prompts of any length, with weights and blends, through a text tower that reads a window of tokens at a
time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.conditioning.prompt import Span, parse
from ldm.diffusion.cond import Cond

Words = list[tuple[str, tuple[int, ...]]]  # the words of a text that have tokens, and their ids


class States(NamedTuple):
    """What a tower says of R rows of tokens, each between its start and end: tokens (R, L, D), which of them
    count (R, L) (None: all), and pooled (R, E), where it is asked for."""

    tokens: Tensor
    mask: Tensor | None
    pooled: Tensor | None


Encode = Callable[[list[list[int]]], States]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens that a tower reads at once, without start and end, and the weight of each."""

    ids: list[int]
    weights: list[float]

    @property
    def plain(self) -> bool:
        """Whether no token has a weight."""
        return all(weight == 1 for weight in self.weights)


def windows(spans: Sequence[Span], words: Callable[[str], Words], room: int) -> list[Window]:
    """The tokens of a text in windows of at most ``room``, at least one window; a word is divided only if it
    is longer than a window."""
    found = [Window(ids=[], weights=[])]
    for _, ids, weight, new in _laid(spans, words, room):
        if new:
            found.append(Window(ids=[], weights=[]))
        found[-1].ids.extend(ids)
        found[-1].weights.extend([weight] * len(ids))
    return found


def word_places(
    spans: Sequence[Span], words: Callable[[str], Words], room: int, length: int | None
) -> list[tuple[str, list[int]]]:
    """The words of a text that have tokens, and where in the context these stand; windows are ``length``
    wide, or None: as long as they are."""
    found: list[tuple[str, list[int]]] = []
    at, start = 1, 0  # a window's first place is its start's
    for word, ids, _, new in _laid(spans, words, room):
        if new:
            start = start + length if length is not None else at + 1
            at = start + 1
        own = list(range(at, at + len(ids)))
        at += len(ids)
        if word is None:
            found[-1][1].extend(own)
        else:
            found.append((word, own))
    return found


def _laid(
    spans: Sequence[Span], words: Callable[[str], Words], room: int
) -> list[tuple[str | None, tuple[int, ...], float, bool]]:
    """(word, ids, weight, whether a window begins with it) of every word; one longer than a window is
    divided, and its later parts have None."""
    found: list[tuple[str | None, tuple[int, ...], float, bool]] = []
    left = room
    for span in spans:
        for word, ids in words(span.text):
            for first in range(0, len(ids), room):
                part = ids[first : first + room]
                new = len(part) > left
                left = (room if new else left) - len(part)
                found.append((None if first else word, part, span.weight, new))
    return found


def read(prompts: Sequence[str], words: Callable[[str], Words], encode: Encode, room: int) -> Cond:
    """The condition of B prompts: context (B, M, D), its mask where something is to be left out, and pooled
    (B, E) where ``encode`` gives it.

    Windows follow each other in the context, each with its own start and end; pooled is their mean, weighted
    by their tokens. A token with weight w becomes e + w·(z − e), z being its state and e the state in the
    same place of the empty prompt (in its last place, where it is shorter). Pooled becomes p + (w − 1)·(p −
    p'), where p' is read without the tokens of that weight, for each run of them. A blend is the mean of its
    alternatives by their shares. What a prompt comes to does not depend on the others. A prompt of one window
    without weights is what the tower gives.
    """
    branches = [parse(prompt) for prompt in prompts]
    cut = [[windows(branch.spans, words, room) for branch in of_prompt] for of_prompt in branches]
    rows = [window for of_prompt in cut for of_branch in of_prompt for window in of_branch]
    states = encode([window.ids for window in rows])
    if len(rows) == len(prompts) and all(row.plain for row in rows):
        return Cond(context=states.tokens, context_mask=states.mask, pooled=states.pooled)
    tokens, pooled = weighed(rows, states, encode)
    empty = encode([[]])
    contexts, kept, at = [], [], 0
    for of_prompt, of_branches in zip(branches, cut, strict=True):
        parts: list[Tensor] = []
        vectors: list[Tensor] = []
        for of_branch in of_branches:
            own = range(at, at + len(of_branch))
            at += len(of_branch)
            # (M, D)
            parts.append(
                torch.cat([tokens[r] if states.mask is None else tokens[r][states.mask[r]] for r in own])
            )
            if pooled is not None:
                counts = torch.tensor([max(1, len(window.ids)) for window in of_branch], device=pooled.device)
                vectors.append(
                    pooled[own[0]]
                    if len(own) == 1
                    else (pooled[list(own)] * counts[:, None]).sum(0) / counts.sum()
                )
        shares = [branch.share for branch in of_prompt]
        contexts.append(mean(extended(parts, empty), shares))
        if vectors:
            kept.append(mean(vectors, shares))
    context, mask = pad_contexts(contexts, masked=states.mask is not None)
    return Cond(context=context, context_mask=mask, pooled=torch.stack(kept) if kept else None)


def weighed(rows: Sequence[Window], states: States, encode: Encode) -> tuple[Tensor, Tensor | None]:
    """The states and pooled states of windows with their weights."""
    tokens, pooled = states.tokens, states.pooled
    if all(row.plain for row in rows):
        return tokens, pooled
    length = tokens.shape[1]
    weight = torch.ones(tokens.shape[:2], dtype=torch.float32)
    for r, row in enumerate(rows):
        weight[r, 1 : 1 + len(row.ids)] = torch.tensor(row.weights)
    weight = weight.to(tokens.device)[..., None]  # (R, L, 1)
    empty = encode([[]])
    last = empty.tokens.shape[1] - 1 if empty.mask is None else int(empty.mask[0].sum()) - 1
    base = empty.tokens[0, torch.arange(length, device=tokens.device).clamp(max=last)]  # (L, D)
    tokens = torch.where(weight == 1, tokens, (base + weight * (tokens - base)).to(tokens.dtype))
    if pooled is None:
        return tokens, None
    runs = [(r, a, b) for r, row in enumerate(rows) for a, b in _runs(row.weights)]
    without = encode([rows[r].ids[:a] + rows[r].ids[b:] for r, a, b in runs]).pooled
    assert without is not None
    changed = pooled.clone()
    for (r, a, _), other in zip(runs, without, strict=True):
        changed[r] += (rows[r].weights[a] - 1) * (pooled[r] - other)
    return tokens, changed


def _runs(weights: Sequence[float]) -> list[tuple[int, int]]:
    """Where runs of one weight other than 1 begin and end."""
    bounds = [0, *(i for i in range(1, len(weights)) if weights[i] != weights[i - 1]), len(weights)]
    return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b and weights[a] != 1]


def extended(parts: list[Tensor], empty: States) -> list[Tensor]:
    """Contexts (M, D) at the longest's length: by empty windows, or by their last state where padding is left
    out."""
    length = max(len(part) for part in parts)
    found = []
    for part in parts:
        missing = length - len(part)
        tail = (
            part[-1:].expand(missing, -1)
            if empty.mask is not None
            else empty.tokens[0].repeat(missing // empty.tokens.shape[1], 1)
        )
        found.append(torch.cat([part, tail]))
    return found


def mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean by shares that sum to 1; one value stays as it is."""
    if len(values) == 1:
        return values[0]
    return (
        torch.stack([share * value.float() for value, share in zip(values, shares, strict=True)])
        .sum(0)
        .to(values[0].dtype)
    )


def pad_contexts(contexts: Sequence[Tensor], *, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Contexts (M, D) as one batch, the shorter ones padded with zeros that the mask leaves out."""
    lengths = torch.tensor([len(context) for context in contexts], device=contexts[0].device)
    batch = torch.nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)  # (B, M, D)
    if not masked and bool((lengths == lengths[0]).all()):
        return batch, None
    return batch, torch.arange(batch.shape[1], device=batch.device) < lengths[:, None]
