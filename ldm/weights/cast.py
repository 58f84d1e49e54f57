"""The one copy of the weights that a change of dtype needs, made quickly, and looked through for NaN while it is in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

CHUNK = 32_000  # elements: they stay in the cache, and torch starts threads of its own only above 32,768
LARGE = 8_000_000  # elements from which on threads are worth while


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous tensors, the floating-point ones of the given dtype; those that already are stay the very same memory."""
    return cast_checked(tensors, dtype, check=False)[0]


def cast_checked(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, *, check: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors as `cast` gives them, and the names of those that then hold NaN or infinity.

    Each of as many threads as torch has takes tensor after tensor, by chunks: one pass over the memory for the copy and the look.
    """

    def work(tensor: Tensor) -> tuple[Tensor, bool]:
        return _cast(tensor.detach(), dtype, check)

    workers = min(torch.get_num_threads(), len(tensors))
    if workers > 1 and sum(tensor.numel() for tensor in tensors.values()) > LARGE:
        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(work, tensors.values()))
    else:
        done = list(map(work, tensors.values()))
    ready = {name: tensor for name, (tensor, _) in zip(tensors, done, strict=True)}
    return ready, [name for name, (_, finite) in zip(tensors, done, strict=True) if not finite]


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; integers always."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()  # one pass, nothing allocated; NaN spreads
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _cast(tensor: Tensor, dtype: torch.dtype | None, check: bool) -> tuple[Tensor, bool]:
    """Between float16 and bfloat16 the CPU goes through float32: the same rounding, and less processor time than torch's direct way."""
    same = dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype
    if tensor.device.type != "cpu" or tensor.dtype.itemsize == 1:
        made = tensor.contiguous() if same else tensor.to(dtype).contiguous()
        return made, not check or is_finite(made)
    tensor = tensor.contiguous()
    flat = tensor.view(-1)
    if same or dtype is None:
        return tensor, not check or all(map(is_finite, flat.split(CHUNK)))
    target = torch.empty(tensor.shape, dtype=dtype)
    through = {tensor.dtype, dtype} == {torch.float16, torch.bfloat16}
    wide = torch.empty(min(CHUNK, flat.numel()) if through else 0, dtype=torch.float32)
    finite = True
    for piece, out in zip(flat.split(CHUNK), target.view(-1).split(CHUNK), strict=True):
        out.copy_(wide[: piece.numel()].copy_(piece) if through else piece)
        finite = finite and (not check or is_finite(out))
    return target, finite
