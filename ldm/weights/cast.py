"""The one copy of the weights that a change of dtype needs, made quickly, and the look for what is not
finite."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.speed.kernels.build import NoKernels, library

CHUNK = 2**19  # elements: two cores' caches hold them in three dtypes
MANY = 2**24  # elements: for fewer it would not pay to compile the kernel, if that is still to be done
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of the compiled kernel


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[dict[str, Tensor], list[str]]:
    """Contiguous tensors, the floating-point ones of the given dtype, and the names of those that hold NaN or
    infinity then.

    Those that already are of the dtype stay the very same memory. On the CPU a compiled kernel changes
    float32, float16 and bfloat16 into each other, all the tensors in one call. Where it is not to be had,
    float16 and bfloat16 go through float32 by chunks: the same rounding, and a fifth of the processor time of
    torch's direct way. Both see whether numbers are finite while they are in the cache.
    """
    wide = torch.empty(CHUNK, dtype=torch.float32)
    made = _compiled(tensors, dtype)
    made |= {
        name: _cast(tensor.detach(), dtype, wide) for name, tensor in tensors.items() if name not in made
    }
    return {name: made[name][0] for name in tensors}, [name for name in tensors if not made[name][1]]


def _compiled(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, tuple[Tensor, bool]]:
    """Those that the compiled kernel takes, in the dtype, and whether each is finite; none where they are
    small or there is no kernel."""
    taken = {
        name: tensor
        for name, tensor in tensors.items()
        if dtype in CODES
        and tensor.dtype in CODES
        and tensor.dtype != dtype
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
    }
    if sum(tensor.numel() for tensor in taken.values()) < MANY:
        return {}
    try:
        lib = library()
    except NoKernels:
        return {}
    made, n = [torch.empty(tensor.shape, dtype=dtype) for tensor in taken.values()], len(taken)
    finite = (ctypes.c_uint8 * n)()
    lib.ldm_convert(
        n,
        (ctypes.c_void_p * n)(*(tensor.data_ptr() for tensor in taken.values())),
        (ctypes.c_void_p * n)(*(tensor.data_ptr() for tensor in made)),
        (ctypes.c_int64 * n)(*(tensor.numel() for tensor in made)),
        (ctypes.c_int * n)(*(CODES[tensor.dtype] for tensor in taken.values())),
        CODES[dtype],
        finite,
        torch.get_num_threads(),
    )
    return {name: (tensor, bool(whole)) for name, tensor, whole in zip(taken, made, finite, strict=True)}


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; integers always."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()  # one pass, nothing allocated; NaN spreads
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _cast(tensor: Tensor, dtype: torch.dtype | None, wide: Tensor) -> tuple[Tensor, bool]:
    if (
        dtype is not None
        and tensor.device.type == "cpu"
        and {tensor.dtype, dtype} == {torch.float16, torch.bfloat16}
    ):
        return _by_chunks(tensor, dtype, wide)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    tensor = tensor.contiguous()
    return tensor, is_finite(tensor)


def _by_chunks(tensor: Tensor, dtype: torch.dtype, wide: Tensor) -> tuple[Tensor, bool]:
    made = torch.empty(
        tensor.shape, dtype=dtype
    ).zero_()  # touched as a whole: the pages' first touch costs more in between
    total = torch.zeros(())  # of float16's numbers: finite if, and only if, all of them are
    for piece, out in zip(tensor.contiguous().view(-1).split(CHUNK), made.view(-1).split(CHUNK), strict=True):
        between = wide[: piece.numel()].copy_(piece)
        out.copy_(between)
        if dtype is torch.bfloat16:
            total += between.sum()
    return made, bool(total.isfinite()) if dtype is torch.bfloat16 else is_finite(made)
