"""Convert weights to another dtype with one copy, and check that they are finite."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.speed.kernels.build import NoKernels, library

CHUNK = 2**19  # elements; in three dtypes they fit into the caches of two cores
MANY = 2**24  # elements; compiling the kernel does not pay for fewer
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the compiled kernel's numbers of dtypes


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[dict[str, Tensor], list[str]]:
    """Convert floating-point tensors to a dtype, and find those that contain NaN or infinity.

    On the CPU, a compiled kernel converts between float32, float16 and bfloat16, all tensors in one call.
    Without it, float16 and bfloat16 are converted to each other through float32 in chunks, which rounds
    identically and takes a fifth of the time of torch's direct conversion. Both check for finite values while
    these are in the cache.

    Args:
        tensors: The tensors by name.
        dtype: The dtype; None keeps each tensor's own.

    Returns:
        Contiguous tensors by name (those that already have the dtype share the memory of the input), and the
        names of those that contain NaN or infinity.
    """
    wide = torch.empty(CHUNK, dtype=torch.float32, device="cpu")
    made = {} if dtype is None else _cast_compiled(tensors, dtype)
    made |= {
        name: _cast_one(tensor.detach(), dtype, wide) for name, tensor in tensors.items() if name not in made
    }
    return {name: made[name][0] for name in tensors}, [name for name in tensors if not made[name][1]]


def _cast_compiled(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, tuple[Tensor, bool]]:
    """Convert tensors with the compiled kernel; return each one that it takes and whether it is finite.

    The result is empty if the tensors are small or there is no kernel.
    """
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
    made, n = [torch.empty(tensor.shape, dtype=dtype, device="cpu") for tensor in taken.values()], len(taken)
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
    return {name: (tensor, bool(ok)) for name, tensor, ok in zip(taken, made, finite, strict=True)}


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity; integers never do."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()  # one pass without allocation; NaN propagates
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _cast_one(tensor: Tensor, dtype: torch.dtype | None, wide: Tensor) -> tuple[Tensor, bool]:
    """Convert a tensor, and return whether it is finite; ``wide`` is a float32 buffer of `CHUNK` elements."""
    if (
        dtype is not None
        and tensor.device.type == "cpu"
        and {tensor.dtype, dtype} == {torch.float16, torch.bfloat16}
    ):
        return _cast_by_chunks(tensor, dtype, wide)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    tensor = tensor.contiguous()
    return tensor, is_finite(tensor)


def _cast_by_chunks(tensor: Tensor, dtype: torch.dtype, wide: Tensor) -> tuple[Tensor, bool]:
    """Convert a tensor through float32 in chunks, and return whether it is finite."""
    # all pages are touched at once: a first touch between the chunks costs more
    made = torch.empty(tensor.shape, dtype=dtype, device="cpu").zero_()
    total = torch.zeros(
        (), device="cpu", dtype=torch.float32
    )  # the sum of float16 numbers is finite if, and only if, all of them are
    for piece, out in zip(tensor.contiguous().view(-1).split(CHUNK), made.view(-1).split(CHUNK), strict=True):
        between = wide[: piece.numel()].copy_(piece)
        out.copy_(between)
        if dtype is torch.bfloat16:
            total += between.sum()
    return made, bool(total.isfinite()) if dtype is torch.bfloat16 else is_finite(made)
