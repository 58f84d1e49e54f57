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


@dataclass(frozen=True, kw_only=True, eq=False)
class BiasScaling(Scaling):
    """b′(s) = b · (1 + s·v), where a module has a bias: peft scales the outputs, of which it is a part."""

    optional: ClassVar[bool] = True

    def leaves(self) -> dict[str, Tensor]:
        """Raise ValueError, as kohya and LyCORIS have no names for it."""
        raise ValueError("(IA)³ of peft scales biases, for which other names have no tensor: it stays peft's")


def peft_factors(ia3_l: Tensor) -> tuple[Tensor, bool]:
    """Return v = l − 1 of peft's factors l, and whether they scale the inputs.

    Args:
        ia3_l: l, shape (out, 1), or (1, in) of a layer that peft calls feed-forward.

    Raises:
        ValueError: If the shape is another, such as that of a convolution.
    """
    if ia3_l.ndim != 2 or 1 not in ia3_l.shape:
        raise ValueError(f"ia3_l has the shape {tuple(ia3_l.shape)}, expected (out, 1) or (1, in)")
    return ia3_l.float().flatten() - 1, ia3_l.shape[0] == 1
