"""Adapters in training: LoRA and its relatives, whose tensors are parameters of a module.

The change of a layer is the same `Delta` that a file is read into, so that a trained adapter computes what it
will compute when it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.support.config import check_between
from ldm.training.config import check_at_least
from ldm.weights.adapters.kinds.decomposed import Decomposed
from ldm.weights.adapters.kinds.delta import Additive, Delta
from ldm.weights.adapters.kinds.kronecker import Kronecker, KroneckerFactor
from ldm.weights.adapters.kinds.low_rank import LowRank
from ldm.weights.adapters.on_the_fly import Changed
from ldm.weights.adapters.places import Places, Site
from ldm.weights.adapters.writing import ModuleChange

AdapterKind = Literal["lora", "dora", "lokr"]
MOST_RANK = 4096


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """The kind of an adapter, and its size.

    Args:
        kind: "lora" (Hu et al. 2021), "dora" (Liu et al. 2024), whose magnitudes are those of the outputs as
            in peft, or "lokr" (LyCORIS). Default: "lora".
        rank: r, at least 1; of LoKr that of the larger matrix, which is full where r reaches half of its
            smaller side. Default: 16.
        alpha: The change is multiplied by alpha / r; None for alpha = r. Default: None.
        rank_stabilized: Whether it is multiplied by alpha / √r instead (rsLoRA, Kalajdzievski 2023). Files
            state the alpha that gives the same factor. Default: False.
        convolutions: Whether residual blocks and resampling change too, beside the layers of transformers.
            Default: False.
        factor: Of LoKr, the largest side of the smaller matrix. Default: 8.
    """

    kind: AdapterKind = "lora"
    rank: int = 16
    alpha: float | None = None
    rank_stabilized: bool = False
    convolutions: bool = False
    factor: int = 8

    def __post_init__(self) -> None:
        check_between(1, MOST_RANK, rank=self.rank, factor=self.factor)
        if self.alpha is not None:
            check_at_least(0, alpha=self.alpha)

    @property
    def scale(self) -> float:
        """c, the factor of the change."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def fresh(self, weight: Tensor, generator: torch.Generator) -> Delta:
        """Return a change of a weight (out, in, …) that changes nothing yet.

        Args:
            weight: The weight.
            generator: Draws the matrices that are not zero.
        """
        inner = self._kronecker(weight, generator) if self.kind == "lokr" else self._lora(weight, generator)
        if self.kind != "dora":
            return inner
        norms = weight.detach().float().flatten(1).norm(dim=1)  # (out,)
        return Decomposed(inner=inner, magnitude=norms.view(-1, *[1] * (weight.ndim - 1)))

    def _lora(self, weight: Tensor, generator: torch.Generator) -> Additive:
        out, inputs, *kernel = weight.shape
        return LowRank(
            up=_zeros(out, self.rank, *[1] * len(kernel)),
            down=_uniform((self.rank, inputs, *kernel), generator),
            scale=self.scale,
        )

    def _kronecker(self, weight: Tensor, generator: torch.Generator) -> Additive:
        out, inputs, *kernel = weight.shape
        rows, columns = _divisor(out, self.factor), _divisor(inputs, self.factor)
        larger = out // rows, inputs // columns
        first = KroneckerFactor(full=_uniform((rows, columns), generator))
        if 2 * self.rank >= min(larger):  # no smaller than the full one
            return Kronecker(first=first, second=KroneckerFactor(full=_zeros(*larger, *kernel)))
        width = larger[1] * math.prod(kernel)
        second = KroneckerFactor(a=_uniform((larger[0], self.rank), generator), b=_zeros(self.rank, width))
        return Kronecker(first=first, second=second, scale=self.scale)


class _Changed(NamedTuple):
    """A change in training: the tensor of a layout, its module's name there, and the change."""

    site: Site
    path: str
    delta: Delta


class TrainedAdapter(nn.Module):
    """The changes of some networks as parameters, and their application while the networks compute.

    Args:
        networks: The networks by part; their weights stay as they are, and require no gradient.
        shape: Kind and size of the changes.
        seed: Seed of the first values.

    Raises:
        ValueError: If a network has no layer that is changed.
    """

    def __init__(self, networks: Mapping[str, nn.Module], shape: AdapterShape, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self._changes: list[_Changed] = []
        for part, network in networks.items():
            own = dict(network.named_parameters())
            found: dict[str, list[_Changed]] = {}
            for place in Places(part, network).layers(convolutions=shape.convolutions):
                site = place.sites["weight"]
                if len(site.ours) != 1:
                    raise ValueError(f"{part}: {place.path} is held in {len(site.ours)} tensors")
                delta = self._registered(part, place.path, shape.fresh(site.read(own).cpu(), generator), own)
                found.setdefault(site.ours[0], []).append(_Changed(site, place.path, delta))
            if not found:
                raise ValueError(f"train: {part!r} has no layer that an adapter changes")
            for name, changes in found.items():
                self._changes += changes
                _apply(network, name, changes)

    def _registered(self, part: str, path: str, delta: Delta, own: Mapping[str, Tensor]) -> Delta:
        """Return a change whose tensors are parameters of this module."""
        device = next(iter(own.values())).device

        def parameter(leaf: str, value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            made = nn.Parameter(value.to(device))
            self.register_parameter(f"{part}_{path}_{leaf}".replace(".", "_"), made)
            return made

        return _mapped(delta, parameter)

    def changes(self) -> list[ModuleChange]:
        """Return the changes as they are, by their names in diffusers, for `write_adapter`."""
        return [
            ModuleChange(
                part=each.site.part,
                path=each.path,
                delta=_mapped(each.delta, lambda _, x: None if x is None else x.detach().cpu()),
            )
            for each in self._changes
        ]


class _Weight(nn.Module):
    """A weight with its changes, computed when it is read (`torch.nn.utils.parametrize`)."""

    def __init__(self, name: str, changes: Sequence[_Changed]) -> None:
        super().__init__()
        self.name, self.changes = name, tuple(changes)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with its changes."""
        values = {self.name: weight}
        for site, _, delta in self.changes:
            changed = delta.apply(site.read(values).float().clone(), 1.0)
            values |= site.write(values, changed.to(weight.dtype))
        return values[self.name]


def _apply(network: nn.Module, name: str, changes: Sequence[_Changed]) -> None:
    """Let a network compute with changes of one of its weights."""
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    layer = isinstance(module, nn.Linear | nn.Conv2d)
    if layer and len(changes) == 1 and isinstance(changes[0].delta, LowRank):
        module.register_forward_hook(Changed([(changes[0].delta, 1.0)]))
    else:
        parametrize.register_parametrization(module, leaf, _Weight(name, changes))


def _mapped(delta: Delta, make: Callable[[str, Tensor | None], Tensor | None]) -> Delta:
    """Return a change with other tensors; `make` takes the name of each and the tensor."""
    if isinstance(delta, Decomposed):
        inner, magnitude = _mapped(delta.inner, make), make("dora_scale", delta.magnitude)
        assert isinstance(inner, Additive) and magnitude is not None
        return Decomposed(inner=inner, magnitude=magnitude)
    if isinstance(delta, LowRank):
        up, down = make("up", delta.up), make("down", delta.down)
        assert up is not None and down is not None
        return LowRank(up=up, down=down, scale=delta.scale)
    assert isinstance(delta, Kronecker)
    first, second = (
        KroneckerFactor(
            full=make(f"w{i}", factor.full), a=make(f"w{i}_a", factor.a), b=make(f"w{i}_b", factor.b)
        )
        for i, factor in ((1, delta.first), (2, delta.second))
    )
    return Kronecker(first=first, second=second, scale=delta.scale)


def _divisor(size: int, most: int) -> int:
    """Return the largest divisor of a size that is at most `most`."""
    return next(k for k in range(min(most, size), 0, -1) if size % k == 0)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device="cpu", dtype=torch.float32)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw numbers in ±1/√inputs, as layers of PyTorch begin."""
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, device="cpu", dtype=torch.float32).uniform_(-bound, bound, generator=generator)
