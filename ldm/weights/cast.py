"""The one copy of the weights that a change of dtype needs, made quickly, and the look for what is not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 2**19  # elements: two cores' caches hold them in three dtypes


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[dict[str, Tensor], list[str]]:
    """Contiguous tensors, the floating-point ones of the given dtype, and the names of those that hold NaN or infinity then.

    Those that already are of the dtype stay the very same memory. Between float16 and bfloat16 the CPU goes through float32 by chunks: the same
    rounding, and a fifth of the processor time of torch's direct way; whether they are finite is seen while they are in the cache.
    """
    wide = torch.empty(CHUNK, dtype=torch.float32)
    made = {name: _cast(tensor.detach(), dtype, wide) for name, tensor in tensors.items()}
    return {name: tensor for name, (tensor, _) in made.items()}, [name for name, (_, finite) in made.items() if not finite]


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; integers always."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()  # one pass, nothing allocated; NaN spreads
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _cast(tensor: Tensor, dtype: torch.dtype | None, wide: Tensor) -> tuple[Tensor, bool]:
    if dtype is not None and tensor.device.type == "cpu" and {tensor.dtype, dtype} == {torch.float16, torch.bfloat16}:
        return _by_chunks(tensor, dtype, wide)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    tensor = tensor.contiguous()
    return tensor, is_finite(tensor)


def _by_chunks(tensor: Tensor, dtype: torch.dtype, wide: Tensor) -> tuple[Tensor, bool]:
    made = torch.empty(tensor.shape, dtype=dtype).zero_()  # touched as a whole: the pages' first touch costs more in between
    total = torch.zeros(())  # of float16's numbers: finite if, and only if, all of them are
    for piece, out in zip(tensor.contiguous().view(-1).split(CHUNK), made.view(-1).split(CHUNK), strict=True):
        between = wide[: piece.numel()].copy_(piece)
        out.copy_(between)
        if dtype is torch.bfloat16:
            total += between.sum()
    return made, bool(total.isfinite()) if dtype is torch.bfloat16 else is_finite(made)
