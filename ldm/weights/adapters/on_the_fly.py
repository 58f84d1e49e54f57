"""Apply changes while a network computes, without touching its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.weights.adapters.kinds.delta import Additive, Delta
from ldm.weights.adapters.kinds.low_rank import LowRank
from ldm.weights.adapters.merging import Weighted


def separated(
    networks: Mapping[str, nn.Module], changes: Iterable[Weighted]
) -> tuple[list[Weighted], list[Weighted]]:
    """Return the changes that can be applied on the fly, and the others.

    The first are those of weights of layers that are called. Norms, biases and embeddings, and the fused
    projections of text towers, are merged instead.
    """
    layers = {
        (part, f"{name}.weight")
        for part, network in networks.items()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    on_the_fly: list[Weighted] = []
    others: list[Weighted] = []
    for each in changes:
        step, part = each.edit.site.step, each.edit.site.part
        single = len(step.ours) == len(step.file) == 1 and not step.change.transpose
        (on_the_fly if single and (part, step.ours[0]) in layers else others).append(each)
    return on_the_fly, others


class Changed:
    """Forward hook of a linear layer or a convolution that adds what changes of its weight add.

    LoRA costs two small products; other sums one of the size of the layer; a change that depends on the
    weight computes the layer again.

    Args:
        changes: The changes of the weight and their strengths, in order.
    """

    def __init__(self, changes: Iterable[tuple[Delta, float]]) -> None:
        self.changes = tuple(changes)
        self._factors: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        x = args[0]
        if not all(delta.additive for delta, _ in self.changes):
            weight = module.weight.detach().float().clone()
            for delta, strength in self.changes:
                weight = delta.apply(weight, strength)
            return _layer(module, x, weight.to(x.dtype), module.bias)
        for i, (delta, strength) in enumerate(self.changes):
            if isinstance(delta, LowRank):
                output = _add_low_rank(module, x, output, *self._low_rank(i, delta, strength, x))
            else:
                assert isinstance(delta, Additive)
                change = delta.difference(tuple(module.weight.shape), x.device).mul_(strength)
                output = output + _layer(module, x, change.to(x.dtype), None)
        return output

    def _low_rank(self, i: int, delta: LowRank, strength: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of a LoRA in the dtype of x, the strength in the second.

        They are kept, unless the LoRA is in training.
        """
        key = i, x.dtype, x.device
        if key not in self._factors:
            up, down = delta.factors(x.device)
            made = down.to(x.dtype), (up * (strength * delta.scale)).to(x.dtype)
            if delta.up.requires_grad:
                return made
            self._factors[key] = made
        return self._factors[key]


def _add_low_rank(
    module: nn.Linear | nn.Conv2d, x: Tensor, output: Tensor, down: Tensor, up: Tensor
) -> Tensor:
    """Return the output of a layer plus `up` of `down` of its input.

    Args:
        module: The layer.
        x: Its input, (..., D) or (B, C, h, w).
        output: Its output.
        down: Shape (r, in) or (r, in, k, k).
        up: Shape (out, r).
    """
    if isinstance(module, nn.Conv2d):
        inner = _layer(module, x, down.reshape(len(down), *module.weight.shape[1:]), None)  # (B, r, h', w')
        return output + F.conv2d(inner, up[:, :, None, None])
    inner = F.linear(x, down.flatten(1))  # (..., r)
    flat = torch.addmm(output.reshape(-1, output.shape[-1]), inner.reshape(-1, len(down)), up.t())
    return flat.view(output.shape)


def _layer(module: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    """Return what a layer computes with another weight."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


class OnTheFly:
    """The hooks of networks whose weights are not changed."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def apply(self, networks: Mapping[str, nn.Module], changes: Iterable[Weighted]) -> None:
        """Replace all hooks by those of changes, in their order (`separated`)."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        modules = {
            (part, name): module
            for part, network in networks.items()
            for name, module in network.named_modules()
        }
        found: dict[tuple[str, str], list[tuple[Delta, float]]] = {}
        for edit, strength in changes:
            if strength != 0:
                place = edit.site.part, edit.site.ours[0].rpartition(".")[0]
                found.setdefault(place, []).append((edit.delta, strength))
        for place, own in found.items():
            self._handles.append(modules[place].register_forward_hook(Changed(own)))
