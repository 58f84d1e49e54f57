"""Products of float32 inputs with weights of 32 or 16 bits, by the compiled kernels.

The weights are widened block by block into a buffer that is used again, so that they need no copy in memory
(docs/speed.md, "Weights in 16 bits").
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.speed.kernels.group_norm import CHANNELS_LAST, pointer
from ldm.support.processor import shared_cache_bytes

WEIGHT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the kernels know the dtypes
ROW_CODES = {**WEIGHT_CODES, torch.int8: 3}  # of weights that a few rows are multiplied with
TRANSFORMED_BYTES = 2**25  # of Winograd's weights that are in memory at once


class Geometry(NamedTuple):
    """How a convolution goes over a map, two numbers each for height and width."""

    padding: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    groups: int


def widens(x: Tensor, weight: Tensor) -> bool:
    """Return whether a product of x and a weight computes in float32 while the weight has 16 bits."""
    return x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)


def widened(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return a weight in float32 if `widens` says so, else as it is."""
    return weight.to(x.dtype) if weight is not None and widens(x, weight) else weight


def linear(lib: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., D), float32, times a weight (D_out, D) plus a bias (D_out,) or None, (..., D_out)."""
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    rows = x.numel() // x.shape[-1]
    _multiply(lib, x, weight, bias, y, (1, 1, rows, *weight.shape[::-1], 1, 1, 1, 1, 0, 0, 1, rows))
    return y


def few_rows(lib: ctypes.CDLL, x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return x (..., D), float32, times a weight (D_out, D) of any of `ROW_CODES`, (..., D_out).

    Args:
        lib: The kernels.
        x: The rows.
        weight: The weight, contiguous.
        scale: Factor of each output, float32, shape (D_out,); None for 1.
    """
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    lib.ldm_rows(
        ROW_CODES[weight.dtype],
        *map(pointer, (x, weight, scale, y)),
        x.numel() // x.shape[-1],
        x.shape[-1],
        ctypes.c_int64(len(weight)),
        torch.get_num_threads(),
    )
    return y


def convolution(
    lib: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Return a convolution of a map, channels last.

    Args:
        lib: The kernels.
        x: Map, float32, shape (B, C, h, w).
        weight: Shape (C_out, C, kernel height, kernel width).
        bias: Shape (C_out,), or None.
        geometry: Padding and stride; without dilation and groups.
    """
    x, weight = x.contiguous(memory_format=CHANNELS_LAST), weight.contiguous()
    (batch, _, h, w), (made, channels, kh, kw) = x.shape, weight.shape
    (ph, pw), (sh, sw) = geometry.padding, geometry.stride
    out_h, out_w = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
    y = torch.empty(batch, made, out_h, out_w, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    sizes = (batch, h, w, channels, made, kh, kw, sh, sw, ph, pw, out_h, out_w)
    _multiply(lib, x, weight, bias, y, sizes)
    return y


def _multiply(
    lib: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, sizes: Sequence[int]
) -> None:
    """Compute y; `sizes` are those of `Layer` in product.cpp."""
    channels, made = sizes[3:5]
    start = x.new_zeros(made) if bias is None else bias.float().contiguous()  # (D_out,)
    zeros = x.new_zeros(channels)
    lib.ldm_product(
        WEIGHT_CODES[weight.dtype],
        *map(pointer, (x, weight, start, zeros, y)),
        (ctypes.c_int * len(sizes))(*sizes),
        torch.get_num_threads(),
    )


def conv3x3_untransformed(lib: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a 3×3 convolution with padding 1, channels last, by Winograd's F(4×4, 3×3).

    The weights are transformed in parts, in a buffer of about `TRANSFORMED_BYTES`.

    Args:
        lib: The kernels.
        x: Map, float32, shape (B, C, h, w). C is a multiple of 16.
        weight: Shape (C_out, C, 3, 3). C_out is a multiple of 16.
        bias: Shape (C_out,), or None.
    """
    x, weight = x.contiguous(memory_format=CHANNELS_LAST), weight.contiguous()
    (batch, channels, h, w), made = x.shape, len(weight)
    y = torch.empty(batch, made, h, w, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    bias = None if bias is None else bias.float().contiguous()
    lib.ldm_winograd_untransformed(
        WEIGHT_CODES[weight.dtype],
        *map(pointer, (x, weight, bias, y)),
        *(batch, h, w, channels, made),
        ctypes.c_int64(shared_cache_bytes()),
        ctypes.c_int64(TRANSFORMED_BYTES),
        torch.get_num_threads(),
    )
    return y
