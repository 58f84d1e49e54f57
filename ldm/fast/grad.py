"""The gradient of the fused group norm, so that it serves training too."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GroupNormGrad(torch.autograd.Function):
    """silu(norm(x + add) · (1 + gain) + offset) of a channels-last map by the kernels, forwards and backwards.

    With x̂ the normalised map, dx = rstd·(dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂)), the means over each group (Wu & He 2018; Ioffe & Szegedy 2015, section 3).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, ops: Any, x: Tensor, weight: Tensor, bias: Tensor, add: Any, gain: Any, offset: Any, norm: nn.GroupNorm, silu: bool
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        mean, m2 = ops.moments(x)  # (B, C) float64
        shift = 0.0 if add is None else add.double()
        grouped = (mean + shift).unflatten(1, (norm.num_groups, -1))  # (B, G, C/G)
        mu = grouped.mean(2, keepdim=True)
        var = (m2.unflatten(1, (norm.num_groups, -1)) / x[0, 0].numel() + (grouped - mu).square()).mean(2, keepdim=True)
        rstd = (var + norm.eps).rsqrt().expand_as(grouped).flatten(1)
        centre = (shift - mu.expand_as(grouped).flatten(1)) * rstd
        factor = weight.double() * (1 if gain is None else 1 + gain.double())  # (B, C) or (C,)
        rest = bias.double() * (1 if gain is None else 1 + gain.double()) + (0 if offset is None else offset.double())
        factor, rest = factor.expand_as(mean), rest.expand_as(mean)
        y: Tensor = ops.affine(x, rstd * factor, centre * factor + rest, silu=silu)
        small = [t.float().contiguous() for t in (rstd, centre, factor, rest)]
        ctx.save_for_backward(x, weight, bias, gain, *small)
        ctx.ops, ctx.groups, ctx.silu = ops, norm.num_groups, silu
        ctx.kinds = [None if t is None else t.dtype for t in (weight, bias, add, gain, offset)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, gain, *small = ctx.saved_tensors
        rstd, _, factor, _ = small
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        sums, products, dx_of = ctx.ops.gradients(x, dy, small, ctx.silu)  # of dz and dz·x̂: (B, C) each

        def mean(t: Tensor) -> Tensor:
            grouped = t.unflatten(1, (ctx.groups, -1))
            return (grouped.mean(2, keepdim=True) / x[0, 0].numel()).expand_as(grouped).flatten(1)

        dx = dx_of(rstd * factor, -rstd * mean(factor * products), -rstd * mean(factor * sums))
        scaled = 1.0 if gain is None else 1 + gain.float()
        grads = [
            (scaled * products).sum(0), (scaled * sums).sum(0), dx.float().sum((2, 3)) if ctx.kinds[2] else None,
            weight.float() * products + bias.float() * sums if ctx.kinds[3] else None, sums,
        ]  # fmt: skip
        typed = [None if kind is None or grad is None else grad.to(kind) for grad, kind in zip(grads, ctx.kinds, strict=True)]
        return (None, dx, *typed, None, None)


def gradients(lib: ctypes.CDLL, x: Tensor, dy: Tensor, small: list[Tensor], silu: bool) -> tuple[Tensor, Tensor, Any]:
    """The two sums of the kernels' gradient, and the function of p, q and r that gives dx."""
    batch, channels, h, w = x.shape
    sums, products = torch.empty(2, batch, channels)
    size = (batch, ctypes.c_int64(h * w), channels, int(silu), torch.get_num_threads())
    code = int(x.dtype == torch.bfloat16)

    def at(*tensors: Tensor) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    lib.ldm_gradient_sums(code, *at(x, dy, *small, sums, products), *size)

    def dx_of(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
        p, q, r = p.contiguous(), q.contiguous(), r.contiguous()
        dx = torch.empty_like(x)
        lib.ldm_gradient_of_x(code, *at(x, dy, *small, p, q, r, dx), *size)
        return dx

    return sums, products, dx_of
