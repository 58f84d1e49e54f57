"""What the processes of a training do together. One process does the same without communication.

Each process trains on its share of every batch. The one rule: a loss or figure that a process computes is
its own summand of the batch's value times the number of processes, so that the mean over the processes is
the value of the batch. PyTorch averages gradients over the processes, hence they are exact as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.support.device import pick_device
from ldm.training.config import Split

Outcome = TypeVar("Outcome")
ModelCall = Callable[..., Any]  # call(function, *arguments) returns the result of function(*arguments)


class Processes:
    """One process, which trains alone; `ldm.training.distributed.group.ProcessGroup` is several.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def device(self, device: str | torch.device) -> torch.device:
        """Return the device of this process, where all were given `device`."""
        return pick_device(device)

    def share(self, samples: range, rank: int | None = None) -> range:
        """Return the samples of a process: consecutive ones, as many as of the others, or one less.

        Args:
            samples: The samples of a batch.
            rank: The process; None for this one. Default: None.
        """
        rank = self.rank if rank is None else rank
        return samples[len(samples) * rank // self.size : len(samples) * (rank + 1) // self.size]

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, without gradients."""
        return value

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of each scalar over the processes, without gradients."""
        return {key: value.detach() for key, value in values.items()}

    def gather(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the values (n, ...) of all processes one behind the other, with gradients.

        Args:
            values: Values of this process.
            counts: n of each process.
        """
        return values

    def once(self, action: Callable[[], Outcome]) -> Outcome:
        """Do something in the first process; return its result, or raise its error, in all."""
        return action()

    def wait(self) -> None:
        """Wait until all processes have come here, however long their work before it takes."""

    def in_turn(self, action: Callable[[], Outcome]) -> Outcome:
        """Do something in the first process, then in all others, which find the files that it has written."""
        return action()

    def wrap(self, model: nn.Module, split: Split) -> ModelCall:
        """Let the processes train a model together.

        Args:
            model: The model, which is changed in place before its optimizer is made.
            split: Whether each process holds the whole model, or a part of each weight.

        Returns:
            Calls a function that computes with the model; backward passes through its result give the
            gradients of the batch.
        """
        return lambda function, *arguments: function(*arguments)

    def holds_all(self, split: Split) -> bool:
        """Return whether each process has the whole model after `wrap`."""
        return True

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the whole gradient, after a backward pass."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


ONE_PROCESS = Processes()
