"""`Cond`: everything that a network may be conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

PRECISE_FIELDS = ("guidance",)
"""The fields whose dtype `Cond.to` keeps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cond:
    """The condition of a batch. All fields are optional; `Cond()` is unconditional.

    Args:
        context: Tokens for cross-attention, shape (B, L, D).
        context_mask: True for tokens that are attended to, bool, shape (B, L). None attends to all tokens.
        pooled: Vector added to the time embedding, shape (B, E).
        image_emb: CLIP image embedding, shape (B, E).
        concat: Channels concatenated to x_t, shape (B, C', h, w).
        hints: What the controls around a UNet read (`ldm.models.control`): several tensors (B, ...).
        features: What T2I-Adapters add on a UNet's way down: a map for each level, and if there is one more,
            for its middle, shapes (B, C, h', w').
        residuals: What ControlNets add to a UNet: a map for each map that its way up reads, and one for its
            middle, shapes (B, C, h', w') or (B, C, 1, 1); to a diffusion transformer: (B, L, D) for each of
            the first blocks.
        output: What controls add to the raw prediction of a diffusion transformer: (B, C, h, w).
        guidance: Guidance scale that the network embeds, shape (B,).
        exemplars: Images of K things in [0, 1] as they lie on the canvas, red, green and blue multiplied by
            opacity, and opacity, shape (B, K, 4, H, W).

    Raises:
        ValueError: If the batch sizes differ, or the mask does not match the context.
    """

    context: Tensor | None = None
    context_mask: Tensor | None = None
    pooled: Tensor | None = None
    image_emb: Tensor | None = None
    concat: Tensor | None = None
    guidance: Tensor | None = None
    exemplars: Tensor | None = None
    hints: tuple[Tensor, ...] | None = None
    features: tuple[Tensor, ...] | None = None
    residuals: tuple[Tensor, ...] | None = None
    output: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the fields of a Cond must have the same batch size, got {sizes}")
        if self.context_mask is not None and (
            self.context is None or self.context_mask.shape != self.context.shape[:2]
        ):
            expected = None if self.context is None else tuple(self.context.shape[:2])
            raise ValueError(
                f"context_mask has shape {tuple(self.context_mask.shape)}, expected (B, L) = {expected} of"
                " the context"
            )

    def items(self) -> list[tuple[str, Tensor]]:
        """Return the names and values of the fields that are set.

        A field of several tensors has an entry for each, such as "hints.0".
        """
        found: list[tuple[str, Tensor]] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                found += [(f"{field.name}.{i}", each) for i, each in enumerate(value)]
            elif value is not None:
                found.append((field.name, value))
        return found

    @staticmethod
    def of(items: Mapping[str, Tensor]) -> Cond:
        """Return the Cond with these entries, named as `items` names them and in its order."""
        values: dict[str, Any] = {}
        for key, value in items.items():
            name, _, index = key.partition(".")
            values[name] = (*values.get(name, ()), value) if index else value
        return Cond(**values)

    @property
    def batch(self) -> int | None:
        """The batch size; None if no field is set."""
        items = self.items()
        return len(items[0][1]) if items else None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """Return the Cond with `fn` applied to every field that is set."""
        return Cond.of({name: fn(value) for name, value in self.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """Return the Cond on a device, its floating-point fields in a dtype.

        The mask stays bool. The guidance scale keeps its dtype, as it is the argument of a sinusoid.
        """
        moved = {}
        for name, value in self.items():
            cast = value.is_floating_point() and name not in PRECISE_FIELDS
            moved[name] = value.to(device=device, dtype=dtype if cast else None)
        return Cond.of(moved)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Cond:
        """Return some entries of the batch.

        Raises:
            TypeError: For an int, which would remove the batch dimension.
        """
        if isinstance(index, int):
            raise TypeError(
                f"index a Cond with a slice or a list, not the int {index}: use cond[{index}:{index + 1}]"
            )
        return self.map(lambda value: value[index])

    def expand(self, n: int) -> Cond:
        """Return the Cond at batch size n; a batch of size 1 is expanded without a copy.

        Raises:
            ValueError: If the batch size is neither 1 nor n.
        """
        if self.batch in (None, n):
            return self
        if self.batch != 1:
            raise ValueError(
                f"a Cond of batch size {self.batch} cannot serve {n} samples: expected batch size 1 or {n}"
            )
        return self.map(lambda value: value.expand(n, *value.shape[1:]))

    def repeat(self, n: int) -> Cond:
        """Return the Cond with each entry repeated n times in a row: (a, b) becomes (a, a, b, b)."""
        return self.map(lambda value: value.repeat_interleave(n, dim=0))

    def padded(self, multiple: int) -> Cond:
        """Return the Cond with its context padded to a multiple of a number of tokens, which are masked.

        Libraries round matrix products of few rows in ways that depend on their number, and those of eight
        or more mostly do not: padded to eight, texts of different lengths have the same bits in a batch as
        alone.
        """
        assert self.context is not None
        return _padded(self, -(-self.context.shape[1] // multiple) * multiple)

    @staticmethod
    def can_cat(conds: Sequence[Cond]) -> bool:
        """Return whether `Cond.cat` can join these Conds.

        They must have the same fields set, with shapes that differ in the batch and the number of tokens
        only.
        """
        shapes = []
        for cond in conds:
            shape = {name: tuple(value.shape[1:]) for name, value in cond.items() if name != "context_mask"}
            if cond.context is not None:
                shape["context"] = shape["context"][1:]
            shapes.append(shape)
        return all(shape == shapes[0] for shape in shapes)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Return several Conds as one batch.

        Contexts of different lengths are padded with zeros, which the mask excludes.

        Raises:
            ValueError: If the fields or shapes differ in anything but batch size and number of tokens.
        """
        if not conds or not Cond.can_cat(conds):
            raise ValueError(
                "cannot join Conds with different fields or shapes:"
                f" {[[n for n, _ in cond.items()] for cond in conds]}"
            )
        if conds[0].context is not None:
            conds = _padded_to_one_length(conds)
        parts = [dict(cond.items()) for cond in conds]
        return Cond.of({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _padded_to_one_length(conds: Sequence[Cond]) -> list[Cond]:
    """Return the Conds padded to the longest context, with masks; unchanged if there is nothing to mask."""
    contexts = [cond.context for cond in conds if cond.context is not None]
    length = max(context.shape[1] for context in contexts)
    if all(context.shape[1] == length for context in contexts) and all(
        cond.context_mask is None for cond in conds
    ):
        return list(conds)
    return [_padded(cond, length) for cond in conds]


def _padded(cond: Cond, length: int) -> Cond:
    """Return a Cond with its context padded to a number of tokens, and a mask that excludes them."""
    context, mask = cond.context, cond.context_mask
    assert context is not None
    if mask is None:
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
    extra = length - context.shape[1]
    context = pad(context, (0, 0, 0, extra))  # (B, length, D)
    return replace(cond, context=context, context_mask=pad(mask, (0, extra), value=False))
