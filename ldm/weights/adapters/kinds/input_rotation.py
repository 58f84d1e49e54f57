"""Orthogonal fine-tuning as peft computes it: rotations of blocks of inputs (Qiu et al. 2023, 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.delta import Delta, wide
from ldm.weights.adapters.kinds.orthogonal import rotations
from ldm.weights.keymap import Shape


def skew_symmetric(values: Tensor, size: int) -> Tensor:
    """Return Q (n, b, b) with the entries above its diagonal, row by row, and Qᵀ = −Q.

    Args:
        values: The entries, shape (n, b·(b−1)/2).
        size: b.
    """
    q = values.new_zeros(len(values), size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=values.device)
    q[:, rows, columns] = values
    return q - q.transpose(1, 2)


def neumann(q: Tensor, terms: int) -> Tensor:
    """Return peft's series for (I + Q)(I − Q)⁻¹: I + 2Q + … + 2Qᵐ⁻¹ + Qᵐ.

    Args:
        q: Q, shape (n, b, b).
        terms: The number that peft's configuration states, at least 1. 1 is I and 2 is I + 2Q; from 3 on m is
            `terms` − 1, but 3 for 3.
    """
    power = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    made = power.clone()  # (n, b, b)
    last = max(3, terms - 1) if terms > 2 else 0
    for k in range(1, max(last, terms - 1) + 1):
        power = power @ q
        made += power if k == last else 2 * power
    return made


@dataclass(frozen=True, kw_only=True, eq=False)
class InputRotation(Delta):
    """W′(s) = W·(s·R + (1−s)·I)ᵀ in blocks of b inputs.

    R is (I − Q)(I + Q)⁻¹, or with `terms` the series for (I + Q)(I − Q)⁻¹, as peft has it.

    Args:
        values: The entries of Q above its diagonal, shape (n, b·(b−1)/2), with n·b = in; n = 1 is one block
            for all inputs.
        terms: See `neumann`; None for the exact inverse. Default: 5, that of peft.
    """

    kind: ClassVar[str] = "OFT of inputs"
    values: Tensor
    terms: int | None = 5

    @property
    def rank(self) -> int:
        """b, the size of a block."""
        return (1 + math.isqrt(1 + 8 * self.values.shape[-1])) // 2

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W′(s)."""
        q = skew_symmetric(wide(self.values, weight.device), self.rank)  # (n, b, b)
        # that formula has B − Bᵀ in place of Q
        r = rotations(-q / 2, 0) if self.terms is None else neumann(q, self.terms)
        turn = torch.eye(self.rank, dtype=r.dtype, device=r.device).lerp(r, strength)  # (n, b, b)
        blocks = weight.reshape(len(weight), -1, 1, self.rank)  # (out, in/b, 1, b)
        return (blocks @ turn.transpose(1, 2)).view(weight.shape)

    def leaves(self) -> dict[str, Tensor]:
        """Raise ValueError, as kohya and LyCORIS have no names for it."""
        raise ValueError("OFT of peft rotates inputs, for which other names have no tensor: it stays peft's")

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        n, b = (self.values.shape[0], self.rank) if self.values.ndim == 2 else (0, 0)
        inputs = math.prod(shape[1:])
        plain = len(shape) >= 2 and inputs == shape[1]
        if (
            not plain
            or not b
            or b * (b - 1) // 2 != self.values.shape[1]
            or inputs % b
            or n not in (1, inputs // b)
        ):
            return (
                f"it rotates inputs by the values {tuple(self.values.shape)}, the model's weight is {shape}"
            )
        return ""
