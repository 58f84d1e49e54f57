"""The one copy of the weights that a change of dtype needs, made quickly."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

CHUNK = 32_000  # elements: they stay in the cache, and torch starts threads of its own only above 32,768
LARGE = 8_000_000  # elements from which on threads are worth while


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous tensors, the floating-point ones of the given dtype; those that already are stay the very same memory.

    Between float16 and bfloat16 the CPU goes through float32 by chunks: the same rounding, and less processor time than torch's direct way.
    Each of as many threads as torch has takes tensor after tensor.
    """
    workers = min(torch.get_num_threads(), len(tensors))
    if workers < 2 or sum(tensor.numel() for tensor in tensors.values()) < LARGE:
        return {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(tensors, pool.map(lambda tensor: _cast(tensor, dtype), tensors.values()), strict=True))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; integers always."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()  # one pass, nothing allocated; NaN spreads
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is None or not tensor.is_floating_point():
        return tensor.contiguous()
    if tensor.device.type != "cpu" or {tensor.dtype, dtype} != {torch.float16, torch.bfloat16}:
        return tensor.to(dtype).contiguous()
    target = torch.empty(tensor.shape, dtype=dtype)
    flat = tensor.contiguous().view(-1)
    wide = torch.empty(min(CHUNK, flat.numel()), dtype=torch.float32)
    for piece, out in zip(flat.split(CHUNK), target.view(-1).split(CHUNK), strict=True):
        out.copy_(wide[: piece.numel()].copy_(piece))
    return target
