"""Several processes, which `torchrun` has started: communication by torch.distributed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.support.device import pick_device, process_device
from ldm.training.config import Split
from ldm.training.distributed.meeting import own_part
from ldm.training.distributed.processes import ONE_PROCESS, ModelCall, Outcome, Processes
from ldm.training.distributed.sharding import gradient_norm, replicate, shard

_current: list[Processes] = []
PATIENCE = timedelta(days=2)  # how long processes wait for what the first one does alone, such as a cache
MEETING = 1800.0  # seconds in which all processes come together
LAST_WORD = 3.0  # seconds that the first one waits for the others where all fail
LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket", "peer")


class ProcessGroup(Processes):
    """The processes of the default group of torch.distributed."""

    def __init__(self, store: dist.Store, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store, self._device, self._waits = store, device, 0

    def device(self, device: str | torch.device) -> torch.device:
        """Return the device of this process: the next GPU for each process of a machine, or the CPU."""
        return pick_device(process_device(device))

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, without gradients."""
        summed = value.detach().to(self._device, copy=True)
        dist.all_reduce(summed)
        return summed.to(value.device)

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of each scalar over the processes, without gradients."""
        keys = sorted(values)
        stacked = torch.stack([values[key].detach().double().to(self._device) for key in keys])
        return dict(zip(keys, self.total(stacked) / self.size, strict=True))

    def gather(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the values (n, ...) of all processes one behind the other, with gradients."""
        gathered: Tensor = _Gather.apply(values, list(counts), self.rank)
        return gathered

    def once(self, action: Callable[[], Outcome]) -> Outcome:
        """Do something in the first process; return its result, or raise its error, in all."""
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        self._wait_for_first()
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: Outcome = outcome[0]
        return result

    def in_turn(self, action: Callable[[], Outcome]) -> Outcome:
        """Do something in the first process, then in all others, which find the files that it has written."""
        if self.first:
            result = action()
            self._wait_for_first()
            return result
        self._wait_for_first()
        return action()

    def wait(self) -> None:
        """Wait until all processes have come here, however long their work before it takes."""
        self._waits += 1
        if self.store.add(f"arrived-{self._waits}", 1) == self.size:
            self.store.set(f"wait-{self._waits}", "here")
        self.store.wait([f"wait-{self._waits}"], PATIENCE)

    def _wait_for_first(self) -> None:
        """Wait until the first process is here, longer than a collective operation may take."""
        self._waits += 1
        key = f"wait-{self._waits}"
        if self.first:
            self.store.set(key, "here")
        else:
            self.store.wait([key], PATIENCE)

    def wrap(self, model: nn.Module, split: Split) -> ModelCall:
        """Let the processes train a model together; see `Processes.wrap`."""
        return replicate(model) if split == "ddp" else shard(model)

    def holds_all(self, split: Split) -> bool:
        """Return whether each process has the whole model after `wrap`."""
        return split == "ddp"

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the whole gradient, after a backward pass."""
        return gradient_norm(parameters)

    def first_to_fail(self) -> bool:
        """Return whether no other process has called this: one of them reports an error of all.

        The first process may hold the store, so it waits until all others have asked, at most `LAST_WORD`
        seconds.
        """
        try:
            found = self.store.add("failures", 1) == 1
            end = time.monotonic() + LAST_WORD
            while self.first and self.store.add("failures", 0) < self.size and time.monotonic() < end:
                time.sleep(0.02)
            return found
        except RuntimeError:  # the process that held the store is lost
            return True


class _Gather(torch.autograd.Function):
    """All shares one behind the other; the gradient of a share is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: list[int], rank: int) -> Tensor:
        padded = values.new_zeros(max(counts), *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.start, ctx.stop = sum(counts[:rank]), sum(counts[: rank + 1])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.stop], None, None


@contextmanager
def joined_processes(device: str | torch.device) -> Iterator[Processes]:
    """Join the processes that `torchrun` has started, inside a `with` block.

    Args:
        device: Where to train: "cpu" (gloo) or "cuda" (NCCL, a GPU for each process).

    Yields:
        The processes; this one alone without `torchrun`.

    Raises:
        ConnectionError: If another process cannot be reached, or is lost inside the block.
        SystemExit: If the block raises an error, and another process was first to raise one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield ONE_PROCESS
        return
    store, rank, size = next(dist.rendezvous("env://"))
    own = pick_device(process_device(device))
    backend = "gloo"
    if own.type == "cuda":
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    store = own_part(store, rank, size, MEETING)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"process {rank} of {size} cannot reach the others ({reason})") from None
    group = ProcessGroup(dist.PrefixStore("ldm", store), own)
    _current.append(group)
    try:
        yield group
        dist.destroy_process_group()
    except Exception as error:
        if not group.first_to_fail():
            raise SystemExit(2) from None
        if is_lost_connection(error):
            raise ConnectionError(
                f"process {rank} of {size} has lost the others ({str(error).splitlines()[0]}): the last"
                " checkpoint is kept, from which the same command continues"
            ) from None
        raise
    finally:
        _current.pop()


def current_processes() -> Processes:
    """Return the processes that train together: those of the surrounding `joined_processes`."""
    return _current[-1] if _current else ONE_PROCESS


@contextmanager
def one_process_alone() -> Iterator[None]:
    """Let what is done inside a `with` block, in one of the processes, take no part in their work."""
    _current.append(ONE_PROCESS)
    try:
        yield
    finally:
        _current.pop()


def is_lost_connection(error: Exception) -> bool:
    """Return whether an error says that another process has ended or cannot be reached."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(word in str(error).lower() for word in LOST)
    )
