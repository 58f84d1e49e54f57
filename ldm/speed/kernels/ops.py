"""The operators that have compiled kernels: `TorchOps` uses PyTorch, `CompiledOps` the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ldm.speed.kernels import product
from ldm.speed.kernels.build import NoKernels, library
from ldm.speed.kernels.group_norm import CHANNELS_LAST, CompiledGroupNorm, dtype_code, pointer
from ldm.speed.kernels.product import Geometry, widened
from ldm.support.processor import InstructionSet, cache_bytes, shared_cache_bytes

APART = 16  # numbers between the parts of Winograd's weights
PACKED_OUTPUTS = 32  # outputs of which the Winograd kernels pack a multiple, or of 16


def transformed() -> bool:
    """Return whether a transform of `torch.func`, or forward-mode differentiation, sees the operators.

    It does not see compiled kernels and packed weights.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


class TorchOps:
    """The operators, computed by PyTorch on any device."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return softmax(q kᵀ / sqrt(d)) v; arguments as in `ldm.models.layers.attention.attend`."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def group_norm(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        *,
        silu: bool = False,
        add: Tensor | None = None,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Return silu(norm(x + add) · (1 + gain) + offset).

        Args:
            x: Feature map, shape (B, C, h, w).
            norm: The group norm.
            silu: Whether to apply SiLU. Default: False.
            add: Shape (B, C). None for 0. Default: None.
            gain: Shape (B, C). None for 0. Default: None.
            offset: Shape (B, C). None for 0. Default: None.

        Returns:
            Shape (B, C, h, w).
        """
        x = x if add is None else x + add[:, :, None, None]  # (B, C, h, w)
        weight, bias = widened(x, norm.weight), widened(x, norm.bias)
        y = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)  # (B, C, h, w)
        if gain is not None:
            y = y * (1 + gain[:, :, None, None])
        if offset is not None:
            y = y + offset[:, :, None, None]
        return F.silu(y) if silu else y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x (..., D) times a weight (D_out, D) plus a bias (D_out,) or None, in the dtype of x."""
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def few_rows(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return x (..., D) times a weight (D_out, D) of any dtype, summed in float32, in the dtype of x.

        Args:
            x: A few rows, shape (..., D).
            weight: Shape (D_out, D).
            scale: Factor of each output, float32, shape (D_out,). None for 1. Default: None.
        """
        if scale is None:
            return F.linear(x, weight.to(x.dtype))
        return (F.linear(x.float(), weight.float()) * scale).to(x.dtype)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """Return a convolution in the dtype of x; arguments as `ldm.speed.kernels.product.convolution`."""
        padding, stride, dilation, groups = geometry
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)

    def conv3x3_untransformed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a 3×3 convolution with padding 1, in the dtype of x."""
        return self.convolution(x, weight, bias, Geometry((1, 1), (1, 1), (1, 1), 1))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the sum of squared deviations of each channel of a map.

        Args:
            x: Feature map, shape (B, C, h, w).

        Returns:
            Two tensors of shape (B, C), float64.
        """
        wide = x.flatten(2).float()  # (B, C, h·w)
        var, mean = torch.var_mean(wide, dim=2, correction=0)  # (B, C) each
        return mean.double(), var.double() * wide.shape[2]

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool) -> Tensor:
        """Return x·scale + shift, with SiLU if `silu`, channels last.

        Args:
            x: Feature map, shape (B, C, h, w).
            scale: Shape (B, C), float32.
            shift: Shape (B, C), float32.
            silu: Whether to apply SiLU.

        Returns:
            Shape (B, C, h, w), in the dtype of x.
        """
        y = torch.addcmul(shift[:, :, None, None], x.float(), scale[:, :, None, None])  # (B, C, h, w)
        return (F.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


def keys_at_once(dim: int) -> int:
    """Return how many keys attention takes in one block: a multiple of 64, from 128 to 1024.

    Two thirds of the L2 cache hold 48 rows of scores and of probabilities, and the keys and values.

    Args:
        dim: Width of a head.
    """
    fitting = cache_bytes(2) * 2 // 3 // (4 * 2 * (48 + dim))
    return max(128, min(1024, fitting // 64 * 64))


class CompiledOps(TorchOps):
    """The operators, computed by the compiled kernels, or by PyTorch for arguments that these do not support.

    The kernels support CPU tensors of float32 and, if the processor does, bfloat16.

    Args:
        isa: The instruction set. Default: None, that of `ldm.speed.kernels.choice.kernel_choice`.

    Raises:
        NoKernels: If the kernels are not available.
    """

    def __init__(self, isa: InstructionSet | None = None) -> None:
        self.lib = library(isa)
        self.dtypes = (torch.float32, torch.bfloat16) if self.lib.has_bf16() else (torch.float32,)

    def __reduce__(self) -> tuple[Callable[[], TorchOps], tuple[()]]:
        return available_ops, ()

    def supports(self, x: Tensor) -> bool:
        """Return whether the kernels support a tensor."""
        return x.device.type == "cpu" and x.dtype in self.dtypes and x.numel() > 0 and not transformed()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return softmax(q kᵀ / sqrt(d)) v; see `TorchOps.attention`."""
        dim, keys = q.shape[-1], k.shape[-2]
        dtypes = {t.dtype for t in (q, k, v)}
        # a mask of keys, the same for all heads and queries
        simple = mask is None or (mask.ndim == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool)
        wide = q.dtype == torch.float32 and dim >= 128  # PyTorch's kernel is as fast for these
        if (
            not simple
            or not self.supports(q)
            or len(dtypes) > 1
            or dim % 8
            or wide
            or v.shape[-1] != dim
            or keys == 0
        ):
            return super().attention(q, k, v, mask)
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        batch, heads, rows = q.shape[:3]
        out = q.new_empty(batch, rows, heads, dim).transpose(1, 2)  # (B, H, L, d), stored as (B, L, H, d)
        strides = (ctypes.c_int64 * 12)(*(s for t in (q, k, v, out) for s in t.stride()[:3]))
        key_mask = (
            None
            if mask is None
            else mask.expand(batch, 1, 1, keys).reshape(batch, keys).contiguous().view(torch.uint8)
        )  # (B, M)
        self.lib.ldm_attention(
            dtype_code(q),
            pointer(q),
            pointer(k),
            pointer(v),
            pointer(key_mask),
            pointer(out),
            strides,
            batch,
            heads,
            rows,
            keys,
            dim,
            keys_at_once(dim),
            torch.get_num_threads(),
        )
        return out

    def group_norm(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        *,
        silu: bool = False,
        add: Tensor | None = None,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Return silu(norm(x + add) · (1 + gain) + offset); see `TorchOps.group_norm`."""
        if not self.supports(x) or norm.weight is None:
            return super().group_norm(x, norm, silu=silu, add=add, gain=gain, offset=offset)
        small = (norm.weight, norm.bias, add, gain, offset)
        return CompiledGroupNorm.apply(
            self.lib, norm.num_groups, norm.eps, silu, x.contiguous(memory_format=CHANNELS_LAST), *small
        )

    def multiplies(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether the kernels multiply x and a weight, of which neither asks for a derivative."""
        derivative = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return (
            x.dtype == torch.float32
            and self.supports(x)
            and weight.device.type == "cpu"
            and weight.dtype in product.WEIGHT_CODES
            and not derivative
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a product; see `TorchOps.linear`."""
        if not self.multiplies(x, weight):
            return super().linear(x, weight, bias)
        return product.linear(self.lib, x, weight, bias)

    def few_rows(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return a product; see `TorchOps.few_rows`."""
        plain = weight.is_contiguous() and weight.device.type == "cpu" and weight.dtype in product.ROW_CODES
        if not plain or not self.supports(x):
            return super().few_rows(x, weight, scale)
        return product.few_rows(self.lib, x.float(), weight, scale).to(x.dtype)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """Return a convolution; see `TorchOps.convolution`."""
        plain = geometry.groups == 1 and tuple(geometry.dilation) == (1, 1)
        if not plain or not self.multiplies(x, weight):
            return super().convolution(x, weight, bias, geometry)
        return product.convolution(self.lib, x, weight, bias, geometry)

    def conv3x3_untransformed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a 3×3 convolution with padding 1; see `ldm.speed.kernels.product.conv3x3_untransformed`."""
        if not self.multiplies(x, weight):
            return super().conv3x3_untransformed(x, weight, bias)
        return product.conv3x3_untransformed(self.lib, x, weight, bias)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the sum of squared deviations of each channel; see `TorchOps.moments`."""
        if not self.supports(x):
            return super().moments(x)
        x = x.contiguous(memory_format=CHANNELS_LAST)
        batch, channels, h, w = x.shape
        mean, m2 = torch.empty(2, batch, channels, dtype=torch.float64, device="cpu")
        self.lib.ldm_moments(
            dtype_code(x),
            pointer(x),
            pointer(mean),
            pointer(m2),
            batch,
            ctypes.c_int64(h * w),
            channels,
            torch.get_num_threads(),
        )
        return mean, m2

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool) -> Tensor:
        """Return x·scale + shift, with SiLU if `silu`; see `TorchOps.affine`."""
        if not self.supports(x):
            return super().affine(x, scale, shift, silu=silu)
        x, scale, shift = (
            x.contiguous(memory_format=CHANNELS_LAST),
            scale.float().contiguous(),
            shift.float().contiguous(),
        )
        batch, channels, h, w = x.shape
        y = torch.empty_like(x)
        threads = torch.get_num_threads()
        self.lib.ldm_affine(
            dtype_code(x),
            pointer(x),
            pointer(scale),
            pointer(shift),
            pointer(y),
            batch,
            ctypes.c_int64(h * w),
            channels,
            int(silu),
            threads,
        )
        return y

    def conv3x3_weights(self, weight: Tensor) -> Tensor:
        """Return the weights of a 3×3 convolution in the form that `conv3x3` takes, four times as large.

        Args:
            weight: Float32, shape (C_out, C, 3, 3).
        """
        made, channels = weight.shape[:2]
        packed = weight.new_empty(36 * (channels * -(-made // PACKED_OUTPUTS) * PACKED_OUTPUTS + APART))
        self.lib.ldm_winograd_weights(
            pointer(weight.contiguous()), pointer(packed), made, channels, torch.get_num_threads()
        )
        return packed

    def conv3x3(self, x: Tensor, weights: Tensor, bias: Tensor | None, out_channels: int) -> Tensor:
        """Return a 3×3 convolution with padding 1, by Winograd's F(4×4, 3×3).

        Args:
            x: Feature map, float32, shape (B, C, h, w). C is a multiple of 16.
            weights: Weights from `conv3x3_weights`.
            bias: Shape (C_out,), or None.
            out_channels: C_out, a multiple of 16.

        Returns:
            Shape (B, C_out, h, w), channels last.
        """
        x = x.contiguous(memory_format=CHANNELS_LAST)
        batch, channels, h, w = x.shape
        y = torch.empty(
            batch, out_channels, h, w, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST
        )
        sizes = (
            batch,
            h,
            w,
            channels,
            out_channels,
            ctypes.c_int64(shared_cache_bytes()),
            torch.get_num_threads(),
        )
        self.lib.ldm_winograd(pointer(x), pointer(weights), pointer(bias), pointer(y), *sizes)
        return y


def available_ops() -> TorchOps:
    """Return the compiled operators where they are available, else PyTorch's.

    An optimized network that was saved with them, or sent to another process, may be read on another machine.
    """
    try:
        return CompiledOps()
    except NoKernels:
        return TorchOps()
