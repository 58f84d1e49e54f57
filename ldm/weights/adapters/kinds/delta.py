"""`Delta`: a change of one weight, at a strength."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.keymap import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta(ABC):
    """A change of the weight W of one module to W′(s), with W′(0) = W and W′(1) as the trainer computes it.

    Attributes:
        kind: Name of the kind.
        additive: Whether W′(s) = W + s·ΔW with a ΔW that does not depend on W. Additive changes commute.
        optional: Whether a module without such a tensor is changed without it.
    """

    kind: ClassVar[str]
    additive: ClassVar[bool] = False
    optional: ClassVar[bool] = False

    @abstractmethod
    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W′(s).

        Args:
            weight: W in float32, in the shape of the file's layout; it may be overwritten.
            strength: s.
        """

    @abstractmethod
    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""

    @abstractmethod
    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them (`ldm.weights.adapters.leaves`)."""

    @property
    def rank(self) -> int | None:
        """The rank of the change; None if it has none."""
        return None

    @property
    def alpha(self) -> float | None:
        """The alpha that gives the factor c = alpha / rank; None without either."""
        scale = getattr(self, "scale", None)
        return None if scale is None or self.rank is None else scale * self.rank

    def __deepcopy__(self, memo: object) -> Delta:
        return self  # nothing changes it

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of the change by name."""
        found: dict[str, Tensor] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                found[each.name] = value
            elif isinstance(value, Delta):
                found |= value.tensors()
        return found


class Additive(Delta):
    """A change W′(s) = W + s·ΔW."""

    additive: ClassVar[bool] = True

    @abstractmethod
    def difference(self, shape: Shape, device: torch.device) -> Tensor:
        """Return ΔW in float32, of the shape of the weight."""

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W + s·ΔW."""
        return weight.add_(self.difference(tuple(weight.shape), weight.device), alpha=strength)


def with_alpha(delta: Delta, leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the leaves of a change that are present, and its alpha."""
    found = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    return (
        found
        if delta.alpha is None
        else {**found, "alpha": torch.tensor(float(delta.alpha), dtype=torch.float32, device="cpu")}
    )


def wide(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in float32 on a device."""
    return tensor.to(device=device, dtype=torch.float32)


def size_misfit(rows: int, columns: int, shape: Shape) -> str:
    """Return why a matrix of changes does not fit a weight of a shape; "" if it fits."""
    need = (shape[0], math.prod(shape[1:]))
    if len(shape) < 2 or (rows, columns) != need:
        return f"it changes a weight of {rows} × {columns}, the model's is {' × '.join(map(str, shape))}"
    return ""


def factors_misfit(**factors: Tensor | None) -> str:
    """Return which of the factors, by name, has less than two dimensions; "" if none."""
    for name, factor in factors.items():
        if factor is not None and factor.ndim < 2:
            return f"{name} has the shape {tuple(factor.shape)}, expected at least 2 dimensions"
    return ""


def matrices_misfit(**factors: Tensor) -> str:
    """Return which of the factors, by name, is no matrix, up to axes of size 1; "" if all are."""
    for name, factor in factors.items():
        if factor.ndim < 2 or math.prod(factor.shape[2:]) != 1:
            return f"{name} has the shape {tuple(factor.shape)}, expected a matrix"
    return ""


def tucker(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return M[p, q, …] = Σ_ij core[i, j, …]·first[i, p]·second[j, q]."""
    return torch.einsum("ij...,ip,jq->pq...", core, first.flatten(1), second.flatten(1))
