"""Cond: everything that a network may be conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Cond:
    """What a network may be conditioned on; ``Cond()`` is unconditional. A ``context_mask`` of None means
    that every token counts."""

    context: Tensor | None = None  # (B, L, D) tokens for cross-attention
    context_mask: Tensor | None = None  # (B, L) bool, True where a token counts
    pooled: Tensor | None = None  # (B, E) vector added to the time embedding
    image_emb: Tensor | None = None  # (B, E) CLIP image embedding
    concat: Tensor | None = None  # (B, C', h, w) channels joined to x_t
    guidance: Tensor | None = None  # (B,) embedded guidance scale

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the fields of a Cond must share one batch size, got {sizes}")
        if self.context_mask is not None and (
            self.context is None or self.context_mask.shape != self.context.shape[:2]
        ):
            expected = None if self.context is None else tuple(self.context.shape[:2])
            raise ValueError(
                f"context_mask has shape {tuple(self.context_mask.shape)}, expected (B, L) = {expected} of"
                " the context"
            )

    def items(self) -> list[tuple[str, Tensor]]:
        """The fields that are set, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, value) for name, value in values if value is not None]

    @property
    def batch(self) -> int | None:
        """The batch size; None where nothing is set."""
        items = self.items()
        return len(items[0][1]) if items else None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """The Cond with ``fn`` applied to every field that is set."""
        return replace(self, **{name: fn(value) for name, value in self.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """The Cond on a device; floating-point fields in a dtype. The mask stays bool, and the guidance
        scale, a number for a sinusoid, as it is."""
        moved = {
            name: value.to(
                device=device, dtype=dtype if value.is_floating_point() and name != "guidance" else None
            )
            for name, value in self.items()
        }
        return replace(self, **moved)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Cond:
        """Some of the batch's entries; a batch stays a batch, so a plain int is refused."""
        if isinstance(index, int):
            raise TypeError(
                f"index a Cond with a slice or a list, not the int {index}: use cond[{index}:{index + 1}]"
            )
        return self.map(lambda value: value[index])

    def expand(self, n: int) -> Cond:
        """The Cond at batch size n: as it is if it has that size already, repeated without a copy if its size
        is 1."""
        if self.batch in (None, n):
            return self
        if self.batch != 1:
            raise ValueError(
                f"a Cond of batch size {self.batch} cannot serve {n} samples: expected batch size 1 or {n}"
            )
        return self.map(lambda value: value.expand(n, *value.shape[1:]))

    def repeat(self, n: int) -> Cond:
        """Each entry n times in a row: (a, b) becomes (a, a, b, b) for n = 2."""
        return self.map(lambda value: value.repeat_interleave(n, dim=0))

    @staticmethod
    def can_cat(conds: Sequence[Cond]) -> bool:
        """Whether ``Cond.cat`` can join these: the same fields set, with equal shapes but for the batch and
        the number of tokens."""
        shapes = []
        for cond in conds:
            shape = {name: tuple(value.shape[1:]) for name, value in cond.items() if name != "context_mask"}
            if cond.context is not None:
                shape["context"] = shape["context"][1:]
            shapes.append(shape)
        return all(shape == shapes[0] for shape in shapes)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """One batch of several; contexts of different lengths are padded with zeros, which the mask leaves
        out.

        Raises ValueError if the fields or shapes differ in anything but batch and tokens.
        """
        if not conds or not Cond.can_cat(conds):
            raise ValueError(
                "cannot join Conds with different fields or shapes:"
                f" {[[n for n, _ in cond.items()] for cond in conds]}"
            )
        if conds[0].context is not None:
            conds = _same_length(conds)
        return Cond(
            **{name: torch.cat([getattr(cond, name) for cond in conds]) for name, _ in conds[0].items()}
        )


def _same_length(conds: Sequence[Cond]) -> list[Cond]:
    """The Conds padded to the longest context; masks appear only where one is needed."""
    contexts = [cond.context for cond in conds if cond.context is not None]
    length = max(context.shape[1] for context in contexts)
    if all(context.shape[1] == length for context in contexts) and all(
        cond.context_mask is None for cond in conds
    ):
        return list(conds)
    padded = []
    for cond, context in zip(conds, contexts, strict=True):
        mask = cond.context_mask
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        extra = length - context.shape[1]
        context = torch.nn.functional.pad(context, (0, 0, 0, extra))  # (B, length, D)
        mask = torch.nn.functional.pad(mask, (0, extra), value=False)  # (B, length)
        padded.append(replace(cond, context=context, context_mask=mask))
    return padded
