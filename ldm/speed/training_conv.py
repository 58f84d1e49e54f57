"""3×3 convolutions with gradients by Winograd's convolution, for training in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldm.speed import packed
from ldm.speed.kernels.ops import CHANNELS_LAST, CompiledOps


class WinogradConvolution(torch.autograd.Function):
    """A 3×3 convolution with padding 1; double backward is not supported.

    The gradient of the input is the convolution of that of the output by the weights with rows and columns
    reversed, and inputs and outputs exchanged. That of the weights is PyTorch's.
    """

    @staticmethod
    def forward(
        ctx: Any,  # the context object of torch.autograd.Function, whose attributes are set here
        ops: CompiledOps,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Return the convolution (B, C_out, h, w) of x (B, C, h, w)."""
        x = x.contiguous(memory_format=CHANNELS_LAST)  # (B, C, h, w)
        ctx.ops, ctx.biased = ops, bias is not None
        ctx.save_for_backward(x, weight)
        return ops.conv3x3_untransformed(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments of `forward`, None for those that are not tensors."""
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=CHANNELS_LAST)  # (B, C_out, h, w)
        dx: Tensor | None = None
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if needs_x:
            dx = ctx.ops.conv3x3_untransformed(dy, weight.flip(2, 3).transpose(0, 1), None)  # (B, C, h, w)
        ones, bias_size = [1, 1], [len(weight)] if ctx.biased else None
        geometry = (ones, ones, ones, False, [0, 0], 1)  # stride, padding, dilation, transposed, ..., groups
        _, dweight, dbias = torch.ops.aten.convolution_backward(
            dy, x, weight, bias_size, *geometry, [False, needs_weight, needs_bias and ctx.biased]
        )
        return None, dx, dweight, dbias


class TrainingConv2d(nn.Conv2d):
    """Convolution that is `WinogradConvolution` in float32 where that is faster.

    Attributes:
        ops: The operators.
    """

    ops: CompiledOps

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution (B, C_out, h', w') of x (B, C, h, w)."""
        if (
            self.weight.dtype == torch.float32
            and self.ops.multiplies(x.detach(), self.weight.detach())
            and not torch.is_autocast_enabled(x.device.type)
            and packed.has_winograd_shape(self, least=packed.WIDE)
            and x.numel() >= packed.POSITIONS * self.in_channels
        ):
            made: Tensor = WinogradConvolution.apply(self.ops, x, self.weight, self.bias)
            return made
        return super().forward(x)
