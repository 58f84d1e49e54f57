"""(IA)³: factors of the inputs or the outputs (Liu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.delta import Delta, wide
from ldm.weights.keymap import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaling(Delta):
    """W′(s) = W · (1 + s·v) along the outputs, or along the inputs.

    Args:
        values: v, with as many entries as there are outputs (or inputs).
        on_input: Whether v scales the inputs.
    """

    kind: ClassVar[str] = "(IA)³"
    values: Tensor
    on_input: bool = False

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W′(s); W is overwritten."""
        factors = 1 + strength * wide(self.values, weight.device).flatten()
        axis = 1 if self.on_input else 0
        return weight.mul_(factors.view(-1, *[1] * (weight.ndim - 1 - axis)))

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        return {"weight": self.values, "on_input": torch.tensor(int(self.on_input), device="cpu")}

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        axis = 1 if self.on_input else 0
        if len(shape) <= axis or self.values.numel() != shape[axis]:
            what = "inputs" if self.on_input else "outputs"
            return f"it scales {self.values.numel()} {what}, the model's weight is {shape}"
        return ""
