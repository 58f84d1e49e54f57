"""The exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """shadow ← d · shadow + (1 − d) · weights, with d rising as (1 + k)/(10 + k) to ``decay``, so that the
    start is soon forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 0, 1, …"""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model holds the averages; afterwards its own weights again."""
        own = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.shadow[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages saved before; KeyError if the names differ."""
        if state.keys() != self.shadow.keys():
            raise KeyError(f"averages of other parameters: {sorted(state.keys() ^ self.shadow.keys())[:5]}")
        for name, value in state.items():
            self.shadow[name].copy_(value)
