"""The averages of weights: the exponential one, and those of the widths that a run is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.training.distributed.sharding import local, split_like
from ldm.training.power_averages import exponent, power_decay


class EMA:
    """The exponential moving average of a model's trained parameters.

    shadow ← d · shadow + (1 − d) · weights, where d rises with step k as (1 + k)/(10 + k) up to `decay`, so
    that the initial weights lose their influence early.

    Beside it, averages of other widths are kept, from which any width can be computed after training
    (`ldm.training.power_averages`).

    Args:
        model: The model; parameters without gradients are left out.
        decay: The highest d, in [0, 1).
        widths: Widths of further averages. Default: none.
        on_cpu: Whether averages are kept on the CPU, wherever the model is. Default: False.
    """

    def __init__(
        self, model: nn.Module, decay: float, *, widths: Sequence[float] = (), on_cpu: bool = False
    ) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = self._copies(on_cpu)
        self.widths = {width: self._copies(on_cpu) for width in widths}

    def _copies(self, on_cpu: bool) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in self.parameters.items()}
        return {name: p.to("cpu", copy=True) if on_cpu else p.clone() for name, p in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after step 0, 1, …"""
        self._move(self.shadow, min(self.decay, (1 + step) / (10 + step)))
        for width, averages in self.widths.items():
            self._move(averages, power_decay(step + 1, exponent(width)))

    def _move(self, averages: Mapping[str, Tensor], decay: float) -> None:
        kept = [local(average) for average in averages.values()]
        weights = [local(p).to(own) for p, own in zip(self.parameters.values(), kept, strict=True)]
        torch._foreach_lerp_(kept, weights, 1 - decay)

    @contextmanager
    def swapped(self, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Give the model the averages inside the context, and its own weights afterwards.

        Args:
            values: Other averages by parameter name, whole ones; None for the exponential one. Default: None.

        Raises:
            KeyError: If the parameter names differ.
        """
        held = self.shadow if values is None else self._as_kept(values)
        self._exchange(held)
        try:
            yield
        finally:
            self._exchange(held)

    def _as_kept(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors as those of the model are kept, in parts if it is sharded."""
        _check_names(values, self.shadow)
        return {name: split_like(values[name].to(p), p.data).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def _exchange(self, averages: Mapping[str, Tensor]) -> None:
        """Exchange weights and averages in place: the parts of a sharded model cannot be replaced."""
        for name, p in self.parameters.items():
            weights, average = local(p), local(averages[name])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, those of other widths by "WIDTH/name"."""
        found = dict(self.shadow)
        for width, values in self.widths.items():
            found |= {f"{width}/{name}": value for name, value in values.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load saved averages.

        Raises:
            KeyError: If the parameter names or the widths differ.
        """
        own = self.state_dict()
        _check_names(state, own)
        for name, value in state.items():
            own[name].copy_(value)


def _check_names(given: Mapping[str, object], own: Mapping[str, object]) -> None:
    if given.keys() != own.keys():
        raise KeyError(f"averages of other parameters: {sorted(given.keys() ^ own.keys())[:5]}")
