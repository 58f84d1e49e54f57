"""The exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.training.distributed.sharding import local


class EMA:
    """The exponential moving average of a model's trained parameters.

    shadow ← d · shadow + (1 − d) · weights, where d rises with step k as (1 + k)/(10 + k) up to `decay`, so
    that the initial weights lose their influence early.

    Args:
        model: The model; parameters without gradients are left out.
        decay: The highest d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after step 0, 1, …"""
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow = [local(average) for average in self.shadow.values()]
        torch._foreach_lerp_(shadow, [local(p) for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the model the averages inside the context, and its own weights afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange weights and averages in place: the parts of a sharded model cannot be replaced."""
        for name, p in self.parameters.items():
            weights, shadow = local(p), local(self.shadow[name])
            kept = weights.clone()
            weights.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load saved averages.

        Raises:
            KeyError: If the parameter names differ.
        """
        if state.keys() != self.shadow.keys():
            raise KeyError(f"averages of other parameters: {sorted(state.keys() ^ self.shadow.keys())[:5]}")
        for name, value in state.items():
            self.shadow[name].copy_(value)
