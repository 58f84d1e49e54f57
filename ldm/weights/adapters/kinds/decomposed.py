"""DoRA: magnitude and direction of a weight changed separately (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.delta import Additive, Delta, wide
from ldm.weights.keymap import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposed(Delta):
    """W′(1) = m · V / ‖V‖ with V = W + ΔW; W′(s) = W + s·(W′(1) − W).

    The norm is that of each row (over all inputs), or of each input (over all outputs and the kernel), as the
    shape of m says: (out, 1, …) or (1, in, …). Trainers agree at s = 1; between, this is the straight line.

    Args:
        inner: The change that gives ΔW.
        magnitude: m.
    """

    kind: ClassVar[str] = "DoRA"
    inner: Additive
    magnitude: Tensor

    @property
    def rank(self) -> int | None:
        """The rank of the inner change."""
        return self.inner.rank

    @property
    def alpha(self) -> float | None:
        """The alpha of the inner change."""
        return self.inner.alpha

    def on_input(self, shape: Shape) -> bool:
        """Return whether m belongs to the inputs of a weight of a shape."""
        if self.magnitude.ndim >= 2:
            return self.magnitude.shape[0] == 1 and self.magnitude.numel() == shape[1] and shape[0] != 1
        return self.magnitude.numel() != shape[0]

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W′(s)."""
        v = weight + self.inner.difference(tuple(weight.shape), weight.device)
        axis = 1 if self.on_input(tuple(weight.shape)) else 0
        others = [i for i in range(weight.ndim) if i != axis]
        norm = v.square().sum(dim=others, keepdim=True).sqrt_() + torch.finfo(v.dtype).eps
        magnitude = wide(self.magnitude, weight.device).reshape(norm.shape)
        return weight.lerp(v * (magnitude / norm), strength)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        return {**self.inner.leaves(), "dora_scale": self.magnitude}

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        if wrong := self.inner.misfit(shape):
            return wrong
        if self.magnitude.numel() != shape[1 if self.on_input(shape) else 0]:
            return f"its magnitudes are {tuple(self.magnitude.shape)}, the model's weight is {shape}"
        return ""
