"""The compiled group norm as a differentiable function, and the conversion of tensors to kernel arguments."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHANNELS_LAST = torch.channels_last


def dtype_code(x: Tensor) -> int:
    """Return the number by which the kernels know the dtype: 0 for float32, 1 for bfloat16."""
    return int(x.dtype == torch.bfloat16)


def pointer(x: Tensor | None) -> ctypes.c_void_p | None:
    """Return the address of a tensor's data, or None, the null pointer."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


class CompiledGroupNorm(torch.autograd.Function):
    """The compiled group norm, with gradients of all its tensors; double backward is not supported."""

    @staticmethod
    def forward(
        ctx: Any,  # the context object of torch.autograd.Function, whose attributes are set here
        lib: ctypes.CDLL,
        groups: int,
        eps: float,
        silu: bool,
        x: Tensor,
        *small: Tensor | None,
    ) -> Tensor:
        """Return the norm of x (B, C, h, w); `small` are weight, bias, add, gain and offset, or None."""
        batch, channels, h, w = x.shape
        y = torch.empty_like(x)
        mean, stats = (
            x.new_empty(batch, channels, dtype=torch.float64),
            x.new_empty(2, batch, groups, dtype=torch.float64),
        )
        wide = [None if t is None else t.float().contiguous() for t in small]
        ctx.sizes = batch, ctypes.c_int64(h * w), channels, groups
        lib.ldm_group_norm(
            dtype_code(x),
            pointer(x),
            *map(pointer, wide),
            pointer(y),
            *map(pointer, (mean, *stats)),
            *ctx.sizes,
            ctypes.c_double(eps),
            int(silu),
            torch.get_num_threads(),
        )
        ctx.lib, ctx.silu = lib, silu
        ctx.save_for_backward(x, mean, stats, *small)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments of `forward`, None for those that are not tensors."""
        x, mean, stats, *small = ctx.saved_tensors
        dy, dx = dy.contiguous(memory_format=CHANNELS_LAST), torch.empty_like(x)
        wide = [None if t is None else t.float().contiguous() for t in small]
        grads = [None if t is None else torch.empty_like(t) for t in wide]
        pointers = (
            *map(pointer, wide),
            *map(pointer, (mean, *stats)),
            pointer(dx),
            *map(pointer, grads),
        )
        ctx.lib.ldm_group_norm_gradient(
            dtype_code(x),
            pointer(x),
            pointer(dy),
            *pointers,
            *ctx.sizes,
            int(ctx.silu),
            torch.get_num_threads(),
        )
        small_grads = (
            None if t is None or grad is None else grad.to(t.dtype)
            for t, grad in zip(small, grads, strict=True)
        )
        return None, None, None, None, dx, *small_grads
