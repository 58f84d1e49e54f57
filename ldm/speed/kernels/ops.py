"""The operators that have kernels of their own, by PyTorch (`Plain`) and by the compiled kernels (`Native`):
the same functions."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldm.speed.kernels.build import library

CHANNELS_LAST = torch.channels_last
BLOCK = 2**23  # bytes of tiles that go through Winograd's products at once: they stay in the cache between


class Plain:
    """By PyTorch's own operators, anywhere."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ / sqrt(d)) v; arguments as in `ldm.models.layers.attention.attend`."""
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
        """silu(norm(x + add) · (1 + gain) + offset) of a map (B, C, h, w); add, gain and offset (B, C), each
        may be absent."""
        y = F.group_norm(
            x if add is None else x + add[:, :, None, None], norm.num_groups, norm.weight, norm.bias, norm.eps
        )
        if gain is not None:
            y = y * (1 + gain[:, :, None, None])
        if offset is not None:
            y = y + offset[:, :, None, None]
        return F.silu(y) if silu else y

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sum of squared deviations of each channel of a map (B, C, h, w): (B, C) float64 each."""
        wide = x.flatten(2).float()
        var, mean = torch.var_mean(wide, dim=2, correction=0)
        return mean.double(), var.double() * wide.shape[2]

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool) -> Tensor:
        """x·scale + shift, and SiLU behind it if asked; scale and shift (B, C) float32."""
        y = torch.addcmul(shift[:, :, None, None], x.float(), scale[:, :, None, None])
        return (F.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


def winograd(weight: Tensor) -> Tensor:
    """Weights (C', C, 3, 3) → G g Gᵀ of F(2×2, 3×3) (Lavin and Gray 2016, eq. 10), (16, C, C'): 16 products
    for four pixels, not 36."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    return torch.stack(
        [torch.einsum("ab,ocab->co", torch.outer(row, column), weight.double()) for row in g for column in g]
    ).to(weight.dtype)


class Native(Plain):
    """By the compiled kernels, on CPU tensors of float32 or bfloat16; by PyTorch where they cannot. NoKernels
    if there are none."""

    def __init__(self) -> None:
        self.lib = library()
        self.dtypes = (torch.float32, torch.bfloat16) if self.lib.has_bf16() else (torch.float32,)

    def __reduce__(self) -> tuple[type[Native], tuple[()]]:
        return Native, ()

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels take a tensor."""
        return x.device.type == "cpu" and x.dtype in self.dtypes and x.numel() > 0

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        dim, keys = q.shape[-1], k.shape[-2]
        kinds = {t.dtype for t in (q, k, v)}
        # of keys alone
        simple = mask is None or (mask.ndim == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool)
        wide = q.dtype == torch.float32 and dim >= 128  # there PyTorch's is as fast
        if (
            not simple
            or not self.takes(q)
            or len(kinds) > 1
            or dim % 8
            or wide
            or v.shape[-1] != dim
            or keys == 0
        ):
            return super().attention(q, k, v, mask)
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        batch, heads, rows = q.shape[:3]
        out = q.new_empty(batch, rows, heads, dim).transpose(1, 2)  # (B, H, L, d) over (B, L, H, d)
        strides = (ctypes.c_int64 * 12)(*(s for t in (q, k, v, out) for s in t.stride()[:3]))
        byte = (
            None
            if mask is None
            else mask.expand(batch, 1, 1, keys).reshape(batch, keys).contiguous().view(torch.uint8)
        )
        self.lib.ldm_attention(
            _code(q),
            _at(q),
            _at(k),
            _at(v),
            _at(byte),
            _at(out),
            strides,
            batch,
            heads,
            rows,
            keys,
            dim,
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
        if not self.takes(x) or norm.weight is None:
            return super().group_norm(x, norm, silu=silu, add=add, gain=gain, offset=offset)
        small = (norm.weight, norm.bias, add, gain, offset)
        return _GroupNorm.apply(
            self.lib, norm.num_groups, norm.eps, silu, x.contiguous(memory_format=CHANNELS_LAST), *small
        )

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.takes(x):
            return super().moments(x)
        x = x.contiguous(memory_format=CHANNELS_LAST)
        batch, channels, h, w = x.shape
        mean, m2 = torch.empty(2, batch, channels, dtype=torch.float64)
        self.lib.ldm_moments(
            _code(x),
            _at(x),
            _at(mean),
            _at(m2),
            batch,
            ctypes.c_int64(h * w),
            channels,
            torch.get_num_threads(),
        )
        return mean, m2

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool) -> Tensor:
        if not self.takes(x):
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
            _code(x),
            _at(x),
            _at(scale),
            _at(shift),
            _at(y),
            batch,
            ctypes.c_int64(h * w),
            channels,
            int(silu),
            threads,
        )
        return y

    def conv3x3(self, x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """A 3×3 convolution of a float32 map (B, C, h, w), one pixel of zeros around it, by weights that
        `winograd` makes; the channels are multiples of 16."""
        x = x.contiguous(memory_format=CHANNELS_LAST)
        batch, channels, h, w = x.shape
        made = weights.shape[2]
        y = torch.empty(batch, made, h, w, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
        tiles = batch * -(-h // 2) * -(-w // 2)
        step = min(tiles, max(64, BLOCK // (64 * channels)))
        before, behind = x.new_empty(16 * step * channels), x.new_empty(16 * step * made)
        threads = torch.get_num_threads()
        for first in range(0, tiles, step):
            n = min(step, tiles - first)
            v, m = (
                before[: 16 * n * channels].view(16, n, channels),
                behind[: 16 * n * made].view(16, n, made),
            )
            own = ctypes.c_int64(first), ctypes.c_int64(n), threads
            self.lib.ldm_winograd_in(_at(x), _at(v), h, w, channels, *own)
            torch.bmm(v, weights, out=m)
            self.lib.ldm_winograd_out(_at(m), _at(bias), _at(y), h, w, made, *own)
        return y


class _GroupNorm(torch.autograd.Function):
    """The compiled group norm with the gradients of all that goes into it."""

    @staticmethod
    def forward(
        ctx: Any, lib: ctypes.CDLL, groups: int, eps: float, silu: bool, x: Tensor, *small: Tensor | None
    ) -> Tensor:
        batch, channels, h, w = x.shape
        y = torch.empty_like(x)
        mean, stats = (
            x.new_empty(batch, channels, dtype=torch.float64),
            x.new_empty(2, batch, groups, dtype=torch.float64),
        )
        wide = [None if t is None else t.float().contiguous() for t in small]
        ctx.sizes = batch, ctypes.c_int64(h * w), channels, groups
        lib.ldm_group_norm(
            _code(x),
            _at(x),
            *map(_at, wide),
            _at(y),
            *map(_at, (mean, *stats)),
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
        x, mean, stats, *small = ctx.saved_tensors
        dy, dx = dy.contiguous(memory_format=CHANNELS_LAST), torch.empty_like(x)
        wide = [None if t is None else t.float().contiguous() for t in small]
        grads = [None if t is None else torch.empty_like(t) for t in wide]
        at = (*map(_at, wide), *map(_at, (mean, *stats)), _at(dx), *map(_at, grads))
        ctx.lib.ldm_group_norm_gradient(
            _code(x), _at(x), _at(dy), *at, *ctx.sizes, int(ctx.silu), torch.get_num_threads()
        )
        back = (None if t is None else made.to(t.dtype) for t, made in zip(small, grads, strict=True))
        return None, None, None, None, dx, *back


def _code(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _at(x: Tensor | None) -> Any:
    return None if x is None else ctypes.c_void_p(x.data_ptr())
