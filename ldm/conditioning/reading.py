"""Long prompts, weights and blends, through a text encoder that reads a window of tokens at a time.

- A long text is divided into windows, each read with its own start and end token. Their states follow each
other in
  the context; the pooled states are averaged, weighted by the windows' numbers of tokens.
- A token with weight w gets the state e + w·(z − e), with z its state and e the state at the same position of
the
  empty prompt. The pooled state becomes p + (w − 1)·(p − p'), with p' read without the tokens of that weight.
- A blend is the mean of its alternatives, weighted by their shares.

The condition of a prompt does not depend on the other prompts of its batch. A prompt of one window without
weights gets exactly what the encoder returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.conditioning.prompt import Branch, Span, parse
from ldm.diffusion.cond import Cond

Tokenize = Callable[[str], list[tuple[str, tuple[int, ...]]]]
"""`text -> [(word, ids)]`: the words of a text that have tokens, and their token ids."""


class EncoderStates(NamedTuple):
    """What an encoder returns for R rows of tokens, each between a start and an end token.

    Attributes:
        tokens: States of the tokens, shape (R, L, D).
        mask: True for tokens that are attended to, bool, shape (R, L); None for all.
        pooled: Pooled states, shape (R, E); None if there are none.
    """

    tokens: Tensor
    mask: Tensor | None
    pooled: Tensor | None


Encode = Callable[[list[list[int]]], EncoderStates]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Token ids that an encoder reads at once, without start and end, and the weight of each."""

    ids: list[int]
    weights: list[float]

    @property
    def unweighted(self) -> bool:
        """Whether all weights are 1."""
        return all(weight == 1 for weight in self.weights)


class _Piece(NamedTuple):
    """A word, or a part of a word that is longer than a window."""

    word: str | None  # None for later parts of a divided word
    ids: tuple[int, ...]
    weight: float
    starts_window: bool


def _pieces(spans: Sequence[Span], tokenize: Tokenize, room: int) -> list[_Piece]:
    """Return the words of a text in windows of at most `room` tokens; longer words are divided."""
    pieces: list[_Piece] = []
    left = room
    for span in spans:
        for word, ids in tokenize(span.text):
            for first in range(0, len(ids), room):
                part = ids[first : first + room]
                starts_window = len(part) > left
                left = (room if starts_window else left) - len(part)
                pieces.append(_Piece(None if first else word, part, span.weight, starts_window))
    return pieces


def split_windows(spans: Sequence[Span], tokenize: Tokenize, room: int) -> list[Window]:
    """Return the tokens of a text in windows, at least one; only words longer than a window are divided.

    Args:
        spans: The texts and their weights.
        tokenize: The tokenizer.
        room: Largest number of tokens in a window, without start and end.
    """
    found = [Window(ids=[], weights=[])]
    for piece in _pieces(spans, tokenize, room):
        if piece.starts_window:
            found.append(Window(ids=[], weights=[]))
        found[-1].ids.extend(piece.ids)
        found[-1].weights.extend([piece.weight] * len(piece.ids))
    return found


def word_positions(
    spans: Sequence[Span], tokenize: Tokenize, room: int, length: int | None
) -> list[tuple[str, list[int]]]:
    """Return the words of a text that have tokens, and the positions of these in the context.

    Args:
        spans: The texts and their weights.
        tokenize: The tokenizer.
        room: Largest number of tokens in a window, without start and end.
        length: Width of a window in the context; None if windows are not padded.
    """
    found: list[tuple[str, list[int]]] = []
    position, start = 1, 0  # position 0 of a window is its start token
    for piece in _pieces(spans, tokenize, room):
        if piece.starts_window:
            start = start + length if length is not None else position + 1
            position = start + 1
        positions = list(range(position, position + len(piece.ids)))
        position += len(piece.ids)
        if piece.word is None:
            found[-1][1].extend(positions)
        else:
            found.append((piece.word, positions))
    return found


def encode_prompts(prompts: Sequence[str], tokenize: Tokenize, encode: Encode, room: int) -> Cond:
    """Return the condition of B prompts, which may be long and have weights and blends.

    Args:
        prompts: B prompts in the syntax of `ldm.conditioning.prompt`.
        tokenize: The tokenizer.
        encode: The encoder: R rows of token ids to their states.
        room: Largest number of tokens that the encoder reads at once, without start and end.

    Returns:
        A Cond with context (B, M, D), a mask (B, M) if there is anything to mask, and pooled (B, E) if the
        encoder returns it.
    """
    branches = [parse(prompt) for prompt in prompts]
    cut = [[split_windows(branch.spans, tokenize, room) for branch in of_prompt] for of_prompt in branches]
    rows = [window for of_prompt in cut for of_branch in of_prompt for window in of_branch]
    states = encode([window.ids for window in rows])
    if len(rows) == len(prompts) and all(row.unweighted for row in rows):
        return Cond(context=states.tokens, context_mask=states.mask, pooled=states.pooled)
    states = apply_weights(rows, states, encode)
    empty = encode([[]])
    contexts, pooled, first = [], [], 0
    for of_prompt, windows in zip(branches, cut, strict=True):
        context, vector = _blended(of_prompt, windows, states, empty, first)
        first += sum(len(of_branch) for of_branch in windows)
        contexts.append(context)
        if vector is not None:
            pooled.append(vector)
    batch, mask = pad_contexts(contexts, masked=states.mask is not None)
    return Cond(context=batch, context_mask=mask, pooled=torch.stack(pooled) if pooled else None)


def _blended(
    branches: Sequence[Branch],
    windows: Sequence[Sequence[Window]],
    states: EncoderStates,
    empty: EncoderStates,
    first: int,
) -> tuple[Tensor, Tensor | None]:
    """Return the context (M, D) and the pooled state (E,) of one prompt.

    Args:
        branches: The alternatives of the prompt.
        windows: The windows of each alternative.
        states: The states of all windows of the batch.
        empty: The states of the empty prompt.
        first: Row of the prompt's first window in `states`.
    """
    contexts: list[Tensor] = []
    vectors: list[Tensor] = []
    for of_branch in windows:
        rows = range(first, first + len(of_branch))
        first += len(of_branch)
        tokens, mask, pooled = states
        contexts.append(
            torch.cat([tokens[r] if mask is None else tokens[r][mask[r]] for r in rows])
        )  # (M, D)
        if pooled is not None:
            counts = torch.tensor([max(1, len(window.ids)) for window in of_branch], device=pooled.device)
            vectors.append(
                pooled[rows[0]]
                if len(rows) == 1
                else (pooled[list(rows)] * counts[:, None]).sum(0) / counts.sum()
            )
    shares = [branch.share for branch in branches]
    context = weighted_mean(extend_to_longest(contexts, empty), shares)
    return context, weighted_mean(vectors, shares) if vectors else None


def apply_weights(rows: Sequence[Window], states: EncoderStates, encode: Encode) -> EncoderStates:
    """Return the states of windows after their tokens' weights; see the module for the formulas.

    Args:
        rows: R windows.
        states: Their states.
        encode: The encoder, for the empty prompt and for pooled states without the weighted tokens.
    """
    if all(row.unweighted for row in rows):
        return states
    tokens, mask, pooled = states
    length = tokens.shape[1]
    weight = torch.ones(tokens.shape[:2], dtype=torch.float32, device="cpu")
    for r, row in enumerate(rows):
        weight[r, 1 : 1 + len(row.ids)] = torch.tensor(row.weights, device="cpu", dtype=torch.float32)
    weight = weight.to(tokens.device)[..., None]  # (R, L, 1)
    empty = encode([[]])
    last = empty.tokens.shape[1] - 1 if empty.mask is None else int(empty.mask[0].sum()) - 1
    base = empty.tokens[0, torch.arange(length, device=tokens.device).clamp(max=last)]  # (L, D)
    tokens = torch.where(weight == 1, tokens, (base + weight * (tokens - base)).to(tokens.dtype))
    if pooled is None:
        return EncoderStates(tokens, mask, None)
    runs = [(r, a, b) for r, row in enumerate(rows) for a, b in _weighted_runs(row.weights)]
    without = encode([rows[r].ids[:a] + rows[r].ids[b:] for r, a, b in runs]).pooled
    assert without is not None
    changed = pooled.clone()
    for (r, a, _), other in zip(runs, without, strict=True):
        changed[r] += (rows[r].weights[a] - 1) * (pooled[r] - other)
    return EncoderStates(tokens, mask, changed)


def _weighted_runs(weights: Sequence[float]) -> list[tuple[int, int]]:
    """Return start and end of each run of equal weights other than 1."""
    bounds = [0, *(i for i in range(1, len(weights)) if weights[i] != weights[i - 1]), len(weights)]
    return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b and weights[a] != 1]


def extend_to_longest(contexts: list[Tensor], empty: EncoderStates) -> list[Tensor]:
    """Return contexts (M, D) extended to the longest one's length.

    They are extended by windows of the empty prompt, or by their last state where padding is masked.
    """
    length = max(len(context) for context in contexts)
    found = []
    for context in contexts:
        missing = length - len(context)
        tail = (
            context[-1:].expand(missing, -1)
            if empty.mask is not None
            else empty.tokens[0].repeat(missing // empty.tokens.shape[1], 1)
        )
        found.append(torch.cat([context, tail]))
    return found


def weighted_mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the mean of tensors by shares that sum to 1, in their dtype; a single tensor is unchanged."""
    if len(values) == 1:
        return values[0]
    return (
        torch.stack([share * value.float() for value, share in zip(values, shares, strict=True)])
        .sum(0)
        .to(values[0].dtype)
    )


def pad_contexts(contexts: Sequence[Tensor], *, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Return contexts (M, D) as one batch (B, M, D) padded with zeros, and its mask (B, M).

    Args:
        contexts: B contexts.
        masked: Whether to return a mask even if all have the same length; otherwise it is None then.
    """
    lengths = torch.tensor([len(context) for context in contexts], device=contexts[0].device)
    batch = torch.nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)  # (B, M, D)
    if not masked and bool((lengths == lengths[0]).all()):
        return batch, None
    return batch, torch.arange(batch.shape[1], device=batch.device) < lengths[:, None]
