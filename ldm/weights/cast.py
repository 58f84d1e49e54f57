"""The one copy of the weights that a change of dtype needs, made quickly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 32_000  # elements: they stay in the cache, and torch starts threads only above 32,768


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous tensors, the floating-point ones of the given dtype; those that already are stay the very same memory.

    Between float16 and bfloat16 the CPU goes through float32 by chunks: the same rounding, and less processor time than torch's direct way.
    """
    return {name: _cast(tensor, dtype) for name, tensor in tensors.items()}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
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
