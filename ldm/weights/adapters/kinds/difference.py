"""Full differences of weights, norms and biases, and replacements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.delta import Additive, Delta, wide
from ldm.weights.keymap import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference(Additive):
    """ΔW = D.

    Args:
        values: D, of the shape of the weight up to ones.
    """

    kind: ClassVar[str] = "full"
    leaf: ClassVar[str] = "diff"
    values: Tensor

    def difference(self, shape: Shape, device: torch.device) -> Tensor:
        """Return ΔW in float32, of the shape of the weight."""
        return wide(self.values, device).reshape(shape)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        return {self.leaf: self.values}

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        return equal_shapes(self.values, shape)


class NormDifference(Difference):
    """The difference of a norm's weight."""

    kind: ClassVar[str] = "norm"
    leaf: ClassVar[str] = "w_norm"


class BiasDifference(Difference):
    """The difference of a bias."""

    kind: ClassVar[str] = "bias"
    leaf: ClassVar[str] = "diff_b"


class NormBiasDifference(BiasDifference):
    """The difference of a norm's bias."""

    kind: ClassVar[str] = "norm"
    leaf: ClassVar[str] = "b_norm"


@dataclass(frozen=True, kw_only=True, eq=False)
class Replacement(Delta):
    """W′(s) = W + s·(V − W): another weight in place of the model's (ComfyUI's `set_weight`).

    Args:
        values: V.
    """

    kind: ClassVar[str] = "replacement"
    values: Tensor

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W′(s)."""
        return weight.lerp(wide(self.values, weight.device).reshape(weight.shape), strength)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        return {"set_weight": self.values}

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        return equal_shapes(self.values, shape)


def equal_shapes(values: Tensor, shape: Shape) -> str:
    """Return why a tensor has not the shape of a weight, up to ones; "" if it has."""
    own = tuple(size for size in values.shape if size != 1)
    if own != tuple(size for size in shape if size != 1) or values.numel() != math.prod(shape):
        return f"it has the shape {tuple(values.shape)}, the model's weight is {shape}"
    return ""
