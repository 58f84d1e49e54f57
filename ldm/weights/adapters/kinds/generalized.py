"""GLoRA: a low-rank change that also depends on the weight (Chavan et al. 2023, LyCORIS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.delta import Delta, factors_misfit, matrices_misfit, wide, with_alpha
from ldm.weights.keymap import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Generalized(Delta):
    """W′(s) = W + s·c·(W A₁ A₂ + B₁ B₂), the first product along the inputs.

    Files of an old order hold the factors the other way round, c·(W A₂ A₁ + B₂ B₁): their a1 is (r, in) and
    their b1 (r, in·k·k).

    Args:
        a1: A₁, shape (in, r) or (in, r, 1, 1).
        a2: A₂, shape (r, in) or (r, in, 1, 1).
        b1: B₁, shape (out, r) or (out, r, 1, 1).
        b2: B₂, shape (r, in) or (r, in, k, k); (r, in, 1, 1) with a core.
        bm: Tucker core (r, r, k, k) between B₁ and B₂. Default: None.
        scale: c.
    """

    kind: ClassVar[str] = "GLoRA"
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    bm: Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return min(self.a1.shape[:2])

    def factors(self, weight: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A₁, A₂, B₁ and B₂, whichever order the file has, for a weight of a shape."""
        a1, a2, b1, b2 = self.a1, self.a2, self.b1, self.b2
        new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
        square = weight[0] == math.prod(weight[1:]) and a2.shape[0] == weight[0]
        return (a1, a2, b1, b2) if new and not square else (a2, a1, b2, b1)

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W′(s)."""
        a1, a2, b1, b2 = (wide(x, weight.device) for x in self.factors(tuple(weight.shape)))
        inputs = a1.flatten(1) @ a2.flatten(1)  # (in, in)
        first = torch.einsum("oi...,ij->oj...", weight, inputs)  # (out, in, …)
        if self.bm is not None:
            b2 = torch.einsum("pq...,qi->pi...", wide(self.bm, weight.device), b2.flatten(1))
        second = (b1.flatten(1) @ b2.flatten(1)).view(weight.shape)  # (out, in, …)
        return weight.add(first.add_(second), alpha=strength * self.scale)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        own: dict[str, Tensor | None] = {
            "a1.weight": self.a1,
            "a2.weight": self.a2,
            "b1.weight": self.b1,
            "b2.weight": self.b2,
            "bm.weight": self.bm,
        }
        return with_alpha(self, own)

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        named = {"a1": self.a1, "a2": self.a2, "b1": self.b1, "b2": self.b2}
        if wrong := factors_misfit(**named, bm=self.bm):
            return wrong
        a1, a2, b1, b2 = self.factors(shape)
        if wrong := matrices_misfit(a1=a1, a2=a2, b1=b1):
            return wrong
        kernel = 1 if self.bm is None else self.bm[0, 0].numel()
        inner = (b2.shape[0],) * 2 if self.bm is None else tuple(self.bm.shape[:2])  # (r, r)
        fits = (
            len(shape) >= 2
            and a1.shape[0] == a2.shape[1] == shape[1]
            and a1.shape[1] == a2.shape[0]
            and b1.shape[0] == shape[0]
            and (b1.shape[1], b2.shape[0]) == inner
            and b2[0].numel() * kernel == math.prod(shape[1:])
        )
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        return "" if fits else f"its factors are {shapes}, the model's weight is {shape}"
