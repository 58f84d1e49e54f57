"""LoKr: the Kronecker product of two matrices, each full or of low rank (LyCORIS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.delta import (
    Additive,
    factors_misfit,
    matrices_misfit,
    size_misfit,
    tucker,
    wide,
    with_alpha,
)
from ldm.weights.keymap import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class KroneckerFactor:
    """One of the two matrices: full, A B, or in Tucker form M[p, q, …] = Σ_ij T[i, j, …] · A[i, p] · B[j, q].

    Args:
        full: The matrix; None if it is factored.
        a: A, shape (out, r); (r, out) in Tucker form.
        b: B, shape (r, in·k·k); (r, in) in Tucker form.
        t: T, shape (r, r, k, k); None without the Tucker form.
    """

    full: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    t: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """r; None if the matrix is full."""
        return None if self.b is None else self.b.shape[0]

    def matrix(self, device: torch.device) -> Tensor:
        """Return the matrix in float32."""
        if self.full is not None:
            return wide(self.full, device)
        assert self.a is not None and self.b is not None
        a, b = wide(self.a, device), wide(self.b, device)
        return a.flatten(1) @ b.flatten(1) if self.t is None else tucker(wide(self.t, device), a, b)

    def shape(self) -> Shape:
        """Return the shape of the matrix, with trailing axes where it has a kernel.

        Raises:
            ValueError: If its factors do not fit each other.
        """
        if self.full is not None:
            if wrong := factors_misfit(lokr_w=self.full):
                raise ValueError(wrong)
            return tuple(self.full.shape)
        if self.a is None or self.b is None:
            raise ValueError("a factored matrix needs both lokr_w_a and lokr_w_b")
        if wrong := matrices_misfit(lokr_w_a=self.a) or factors_misfit(lokr_w_b=self.b):
            raise ValueError(wrong)
        if self.t is not None:
            if wrong := matrices_misfit(lokr_w_b=self.b):
                raise ValueError(wrong)
            if self.t.ndim < 3 or tuple(self.t.shape[:2]) != (self.a.shape[0], self.b.shape[0]):
                raise ValueError(f"the Tucker core {tuple(self.t.shape)} does not fit its factors")
            return self.a.shape[1], self.b.shape[1], *self.t.shape[2:]
        if self.a.shape[1] != self.b.shape[0]:
            raise ValueError(
                f"the factors {tuple(self.a.shape)} and {tuple(self.b.shape)} have different ranks"
            )
        return self.a.shape[0], self.b[0].numel()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors by name, with a prefix."""
        named = {"": self.full, "_a": self.a, "_b": self.b, "_t": self.t}
        return {prefix + name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class Kronecker(Additive):
    """ΔW = c · W₁ ⊗ W₂, with W₁ (out₁, in₁), W₂ (out₂, in₂·k·k), out = out₁·out₂ and in = in₁·in₂.

    Args:
        first: W₁.
        second: W₂.
        scale: c; 1 if both are full.
    """

    kind: ClassVar[str] = "LoKr"
    first: KroneckerFactor
    second: KroneckerFactor
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """The rank of W₂, or else of W₁; None if both are full."""
        return self.first.rank if self.second.rank is None else self.second.rank

    def difference(self, shape: Shape, device: torch.device) -> Tensor:
        """Return ΔW in float32, of the shape of the weight."""
        first, second = self.first.matrix(device), self.second.matrix(device)
        rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
        if second.ndim == 2 and math.prod(shape) == rows * columns and len(shape) > 2:
            # the columns of W₂ are (in₂, k, k)
            second = second.view(len(second), -1, *shape[2:])
        first = first.view(*first.shape[:2], *[1] * (second.ndim - 2))
        return torch.kron(first, second.contiguous()).mul_(self.scale).reshape(shape)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        own: dict[str, Tensor | None] = {
            f"lokr_w{i}{name}": value
            for i, factor in ((1, self.first), (2, self.second))
            for name, value in (("", factor.full), ("_a", factor.a), ("_b", factor.b))
        }
        return with_alpha(self, {**own, "lokr_t2": self.second.t})

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        try:
            first, second = self.first.shape(), self.second.shape()
        except ValueError as error:
            return str(error)
        if len(first) > 2 and math.prod(first[2:]) != 1:
            return f"lokr_w1 has the shape {first}, expected a matrix"
        return size_misfit(first[0] * second[0], first[1] * math.prod(second[1:]), shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the change by name."""
        return {**self.first.tensors("first"), **self.second.tensors("second")}
