"""LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2022, LyCORIS)."""

from __future__ import annotations

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
class Hadamard(Additive):
    """ΔW = c · (A₁ B₁) ⊙ (A₂ B₂), with A (out, r) and B (r, in·k·k).

    In Tucker form each factor is M[p, q, y, x] = Σ_ij T[i, j, y, x] · A[i, p] · B[j, q].

    Args:
        a1, a2: A₁ and A₂, shape (out, r); (r, out) in Tucker form.
        b1, b2: B₁ and B₂, shape (r, in·k·k); (r, in) in Tucker form.
        t1, t2: T₁ and T₂, shape (r, r, k, k); None without the Tucker form.
        scale: c.
    """

    kind: ClassVar[str] = "LoHa"
    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return self.b1.shape[0]

    def difference(self, shape: Shape, device: torch.device) -> Tensor:
        """Return ΔW in float32, of the shape of the weight."""
        first = _factor(self.a1, self.b1, self.t1, device)
        second = _factor(self.a2, self.b2, self.t2, device)
        return first.mul_(second).mul_(self.scale).reshape(shape)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        own: dict[str, Tensor | None] = {
            "hada_w1_a": self.a1,
            "hada_w1_b": self.b1,
            "hada_w2_a": self.a2,
            "hada_w2_b": self.b2,
            "hada_t1": self.t1,
            "hada_t2": self.t2,
        }
        return with_alpha(self, own)

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        for a, b, t in ((self.a1, self.b1, self.t1), (self.a2, self.b2, self.t2)):
            if wrong := matrices_misfit(hada_w_a=a) or factors_misfit(hada_w_b=b):
                return wrong
            rows, columns, rank = a.shape[0], b[0].numel(), a.shape[1]
            if t is not None:
                if wrong := matrices_misfit(hada_w_b=b):
                    return wrong
                if t.ndim < 3 or tuple(t.shape[:2]) != (a.shape[0], b.shape[0]):
                    return f"the Tucker core {tuple(t.shape)} does not fit its factors"
                rows, columns, rank = a.shape[1], b.shape[1] * t[0, 0].numel(), b.shape[0]
            if rank != b.shape[0]:
                return f"the factors {tuple(a.shape)} and {tuple(b.shape)} have different ranks"
            if wrong := size_misfit(rows, columns, shape):
                return wrong
        return ""


def _factor(a: Tensor, b: Tensor, t: Tensor | None, device: torch.device) -> Tensor:
    """Return one of the two factors of the product."""
    a, b = wide(a, device), wide(b, device)
    return a.flatten(1) @ b.flatten(1) if t is None else tucker(wide(t, device), a, b)
