"""Token merging in self-attention (Bolya & Hoffman 2023).

It changes the result.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.attention import Attention
from ldm.models.layers.transformer import SpatialTransformer
from ldm.speed.networks import unets
from ldm.speed.substitute import Substitute

# (h, w) of the map whose positions are the tokens of the transformer that this thread computes
_SIZE: ContextVar[tuple[int, int]] = ContextVar("size", default=(0, 0))


class Merge(Substitute[Attention]):
    """Forward of a self-attention over fewer tokens.

    A fraction `ratio` of the positions, those most similar to a position in an even row and column, is
    averaged with that position before the attention, and takes its result. The paper draws one position of
    each 2×2 at random; here it is the first, so that an image stays a function of its seed. Nothing is merged
    if a control reads the probabilities (`ldm.models.layers.attention.attention_control`) or changes the
    inputs of projections, or gradients are enabled.
    """

    def __init__(self, attention: Attention, ratio: float) -> None:
        super().__init__(attention)
        self.ratio = ratio

    def __call__(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        size = _SIZE.get()
        if (
            context is not None
            or self.module.controls
            or any(join.inputs for join in self.module.joins)
            or torch.is_grad_enabled()
            or size[0] * size[1] != x.shape[1]
        ):
            return self.original_forward(x, context, mask)
        at, tokens = assign(x, size, self.ratio)
        return take(self.original_forward(means(x, at, tokens)), at)


class Sized(Substitute[SpatialTransformer]):
    """Forward of a transformer that passes the size of its map to its merging self-attentions."""

    def __call__(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        token = _SIZE.set((x.shape[-2], x.shape[-1]))
        try:
            return self.original_forward(x, context, mask)
        finally:
            _SIZE.reset(token)


def assign(x: Tensor, size: tuple[int, int], ratio: float) -> tuple[Tensor, int]:
    """Return the token that each position is merged to, and the number of tokens.

    Args:
        x: Positions, shape (B, h·w, D).
        size: (h, w).
        ratio: Fraction of the positions that are merged, rounded down; at most all that are not in an even
            row and column.

    Returns:
        Indices of tokens, int64, shape (B, h·w), and their number.
    """
    fixed, free = (index.to(x.device) for index in even_positions(*size))
    merged = min(int(ratio * x.shape[1]), len(free))
    unit = F.normalize(x, dim=-1)  # (B, h·w, D)
    # (B, free) each: the largest cosine, and the fixed position that has it
    best, token = (unit[:, free] @ unit[:, fixed].transpose(1, 2)).max(dim=-1)
    alone = best.argsort(dim=-1, descending=True)[:, merged:]  # (B, free − merged)
    token.scatter_(1, alone, (len(fixed) + torch.arange(alone.shape[1], device=x.device)).expand_as(alone))
    at = token.new_empty(x.shape[:2])  # (B, h·w)
    at[:, fixed], at[:, free] = torch.arange(len(fixed), device=x.device), token
    return at, x.shape[1] - merged


@lru_cache(maxsize=16)
def even_positions(h: int, w: int) -> tuple[Tensor, Tensor]:
    """Return the positions of an h×w map in even rows and columns, and the other positions."""
    even = torch.zeros(h, w, dtype=torch.bool, device="cpu")
    even[::2, ::2] = True
    return even.flatten().nonzero()[:, 0], (~even).flatten().nonzero()[:, 0]


def flat_rows(at: Tensor, tokens: int) -> Tensor:
    """Return token indices (B, L) as rows (B·L,) of the tokens of all samples, concatenated."""
    return (at + tokens * torch.arange(len(at), device=at.device)[:, None]).flatten()


def means(x: Tensor, at: Tensor, tokens: int) -> Tensor:
    """Return the mean of the positions of each token.

    Args:
        x: Positions, shape (B, L, D).
        at: Token of each position, shape (B, L).
        tokens: Number of tokens.

    Returns:
        Shape (B, tokens, D).
    """
    index = flat_rows(at, tokens)  # (B·L,); index_add_ is ten times as fast on a CPU as scatter_reduce
    total = x.new_zeros(len(x) * tokens, x.shape[2], dtype=torch.float32).index_add_(
        0, index, x.flatten(0, 1).float()
    )  # (B·tokens, D)
    mean = total / torch.bincount(index, minlength=len(total))[:, None]  # (B·tokens, D)
    return mean.to(x.dtype).unflatten(0, (len(x), tokens))


def take(y: Tensor, at: Tensor) -> Tensor:
    """Return the token of each position, (B, L, D), of tokens y (B, tokens, D) and indices (B, L)."""
    return y.flatten(0, 1)[flat_rows(at, y.shape[1])].unflatten(0, at.shape)


def merge_tokens(pipe: nn.Module, ratio: float) -> tuple[str, ...]:
    """Let the self-attentions of the UNets' largest level with attention merge tokens; see `Merge`.

    Args:
        pipe: The pipeline, or a UNet.
        ratio: Fraction of the positions that are merged, in [0, 0.75]; 0 merges nothing.

    Returns:
        A description of what was done; empty for a ratio of 0.

    Raises:
        ValueError: If the ratio is out of range, or there is no UNet.
    """
    if not 0 <= ratio <= 0.75:
        raise ValueError(f"merge: expected a fraction of the positions from 0 to 0.75, got {ratio!r}")
    for net in unets(pipe) if ratio else []:
        level = next((i for i, depth in enumerate(net.config.depth) if depth), None)
        if level is None:
            continue
        for blocks in (net.down_blocks[level], net.up_blocks[len(net.up_blocks) - 1 - level]):
            for transformer in blocks.attentions or ():
                if (
                    isinstance(transformer, SpatialTransformer)
                    and not transformer.transformer_blocks[0].only_cross
                ):
                    for block in transformer.transformer_blocks:
                        Merge(block.attn1, ratio)
                    Sized(transformer)
    description = f"merge: {ratio:g} of the positions merged in the largest self-attentions (approximate)"
    return (description,) if ratio else ()
