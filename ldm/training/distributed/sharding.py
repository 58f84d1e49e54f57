"""Replicated models (DDP) and sharded ones (FSDP2), and what reads their gradients and weights.

The weights of a sharded model are `DTensor`s: each process holds some rows of each. They are whole while
their block computes.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.training.distributed.processes import ModelCall


class Caller(nn.Module):
    """A module whose forward pass is any function that computes with a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a function."""
        return function(*arguments)


def replicate(model: nn.Module) -> ModelCall:
    """Let every process hold a whole model, that of the first process; backward passes average gradients."""
    from torch.nn.parallel import DistributedDataParallel

    caller = Caller(model)
    known = inspect.signature(DistributedDataParallel).parameters
    synchronized = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # a step may leave weights out, such as those of a network that learns from some samples only
    options: dict[str, Any] = {"find_unused_parameters": True, synchronized: False}
    trained = DistributedDataParallel(caller, **options)

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return (trained if torch.is_grad_enabled() else caller)(function, *arguments)

    return call


def shard(model: nn.Module) -> ModelCall:
    """Let every process hold a part of each weight of a model, that of the first process.

    The groups of weights that are whole at a time are the blocks (see `blocks`), and what is outside them.
    Scalars, and weights that several modules share, are replicated. Mixed precision is autocast, as in a
    replicated model, so that both compute the same.
    """
    from torch.distributed.fsdp import fully_shard

    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.contiguous()  # FSDP2 knows no other memory format
        dist.broadcast(value.data, src=0)
    caller = Caller(model)
    names = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    replicated = {p for p, count in names.items() if p.ndim == 0 or count > 1}
    for block in list(blocks(model)):
        fully_shard(block, ignored_params=replicated)
    # weights that stayed whole after a validation would be those of the average
    fully_shard(caller, reshard_after_forward=True, ignored_params=replicated)
    for p in replicated:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_average_gradient)
    return caller


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Return the outermost items of lists of modules that are called as a whole and have weights."""
    for child in module.children():
        called = type(child).forward is not nn.Module.forward
        if isinstance(module, nn.ModuleList) and called and next(child.parameters(), None) is not None:
            yield child
        else:
            yield from blocks(child)


def _average_gradient(p: Tensor) -> None:
    assert p.grad is not None
    dist.all_reduce(p.grad)
    p.grad /= dist.get_world_size()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of the whole gradient of a replicated or sharded model."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    square = torch.nn.utils.get_total_norm(parts).square().to(gradients[0].device) if parts else None
    if square is None:
        return torch.nn.utils.get_total_norm(whole)
    dist.all_reduce(square)
    return (square + torch.nn.utils.get_total_norm(whole).square().to(square)).sqrt()


def clip_gradient(parameters: Sequence[nn.Parameter], norm: Tensor, most: float) -> None:
    """Scale a gradient of a norm in place, if that is more than `most`."""
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            local(p.grad).mul_(factor.to(p.grad.device))


def local(value: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; it shares memory with the tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a whole tensor, which all processes have, split among the processes as `model` is."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
