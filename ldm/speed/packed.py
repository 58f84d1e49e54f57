"""Linear and convolution layers with weights in the memory layout in which oneDNN multiplies.

PyTorch's layers convert the weights in every call; these keep the converted copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.speed.kept_forms import clear_derived, derived
from ldm.speed.kernels.ops import CHANNELS_LAST, CompiledOps, TorchOps, transformed
from ldm.speed.kernels.product import Geometry, widens
from ldm.support.derived import kept_for_call

_T = TypeVar("_T")
mkldnn = torch.ops.mkldnn
# channels, and pixels of all maps together, from which Winograd's convolution is faster in float32; four
# times as many pixels where the weights are transformed at every call
WIDE, POSITIONS = (64, 128)
# bytes of transformed weights that a layer keeps; larger ones are transformed at every call
MOST_KEPT = 2**26


def packable(dtype: torch.dtype) -> bool:
    """Return whether oneDNN is available and packs weights of a dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether derivatives of tensors are asked for, which packed layers and kernels do not compute.

    These are gradients, and derivatives by `torch.func` and by forward-mode automatic differentiation.
    """
    return transformed() or (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    )


class WeightFile(Protocol):
    """A file that holds plain weights, so that their pages may leave memory (`ldm.speed.spill.Spilled`)."""

    def separate_allocations(self) -> AbstractContextManager[None]:
        """Allocate blocks in pages of their own, inside a `with` block."""

    def evict(self, weight: Tensor) -> None:
        """Let the pages of a weight leave memory."""

    def release(self) -> None:
        """Move the weights back to memory."""


class Packed(nn.Module):
    """Base class of layers that multiply with a packed copy of their weight, made at the first call.

    The weight itself stays a parameter. The copy is made again when the weight has changed
    (`ldm.support.derived`). With derivatives the layer computes with the weight itself. A weight of 16 bits
    that meets inputs in float32 has no copy: it is widened in each product (`ldm.speed.kernels.product`).

    Attributes:
        ops: The operators.
        spilled: The file that holds the weight, from which it may leave memory. None: it is in memory.
        parts: Number of equal parts of the weight, along the outputs, that are packed separately.
    """

    weight: Tensor
    bias: Any  # a parameter or None, which torch annotates differently in each layer
    ops: TorchOps = TorchOps()
    spilled: WeightFile | None = None
    parts = 1

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return a weight packed for inputs of the shape of x."""
        raise NotImplementedError

    def packs(self, x: Tensor) -> bool:
        """Return whether x is multiplied with a packed weight; otherwise the layer computes as before."""
        # a tensor of another class, or one that is computed when it is read, is no parameter of this layer
        weight = self._parameters.get("weight")
        return (
            type(weight) is nn.Parameter
            and x.numel() > 0
            and {x.device.type, weight.device.type} == {"cpu"}
            and weight.dtype == x.dtype
            and packable(x.dtype)
            and not needs_gradient(x, weight, self.bias)
        )

    def packed_weights(self, x: Tensor) -> list[Tensor] | None:
        """Return the packed weights; None if `packs` is false."""
        return self.from_weight("packed", lambda weight: self._pack(weight, x)) if self.packs(x) else None

    def from_weight(self, name: str, make: Callable[[Tensor], _T]) -> _T:
        """Return what a function makes of the weight, kept as the attribute `name` (`derived`)."""
        weight = self.weight
        made: _T = derived(self, name).of([weight], lambda: make(weight.detach()), read=self.read)
        return made

    @property
    def read(self) -> Callable[[Tensor], None] | None:
        """What is called with a weight that was read: it leaves memory if it is in a file."""
        return None if self.spilled is None else self.spilled.evict

    def _pack(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        with nullcontext() if self.spilled is None else self.spilled.separate_allocations():
            return [self.reorder(part.contiguous(), x) for part in weight.chunk(self.parts)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        clear_derived(self)  # a copy that is out of date takes memory
        return super()._apply(fn, recurse)


class PackedLinear(Packed, nn.Linear):
    """Linear layer with packed weights."""

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return a weight packed for x (..., D)."""
        return mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., D_out) of x (..., D)."""
        if widens(x, self.weight):
            return self.ops.linear(x, self.weight, self.bias)
        packed = self.packed_weights(x)
        return (
            F.linear(x, self.weight, self.bias)
            if packed is None
            else mkldnn._linear_pointwise(x, packed[0], self.bias, "none", [], "")
        )


class ContextLinear(PackedLinear):
    """Projection of a context to keys or values, computed once while the context is the same tensor.

    Guidance passes the same tensor at every step, so that the projection runs once per prompt. It is kept for
    the call (`ldm.support.calls`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection (B, M, D_out) of a context x (B, M, D)."""
        packs = self.packs(x) or (widens(x, self.weight) and not transformed())
        if torch.is_grad_enabled() or x.is_inference() or not packs:
            return super().forward(x)
        sources = [x, self.weight, *([] if self.bias is None else [self.bias])]
        return kept_for_call(self, sources, lambda: self._project(x), read=self.read)

    def _project(self, x: Tensor) -> Tensor:
        # used once per prompt, so that a weight in a file is not packed
        kept = self.spilled is None or widens(x, self.weight)
        return super().forward(x) if kept else F.linear(x, self.weight, self.bias)


class HalvedLinear(PackedLinear):
    """Linear layer whose outputs are two halves with packed weights of their own: GEGLU's value and gate."""

    parts = 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., D_out) of x (..., D), whose halves are used by `FastGEGLU`."""
        if widens(x, self.weight):
            return self.ops.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def pack_kernel(weight: Tensor, geometry: Geometry, shape: Sequence[int]) -> Tensor:
    """Return the weight of a convolution, packed for maps of a shape (B, C, h, w)."""
    return mkldnn._reorder_convolution_weight(weight, *geometry, list(shape))


def convolve_packed(x: Tensor, packed: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return a convolution (B, C_out, h', w') of x (B, C, h, w) by a weight from `pack_kernel`."""
    return mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


class PackedConv2d(Packed, nn.Conv2d):
    """Convolution of channels-last maps with packed weights.

    In float32, 3×3 convolutions of large maps use Winograd's convolution if the compiled kernels are
    available.
    """

    @property
    def geometry(self) -> Geometry:
        """Padding, stride, dilation and groups."""
        assert not isinstance(self.padding, str)
        return Geometry(self.padding, self.stride, self.dilation, self.groups)

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return a weight packed for x (B, C, h, w)."""
        return pack_kernel(weight, self.geometry, x.shape)

    def packs(self, x: Tensor) -> bool:
        """Return whether x is multiplied with a packed weight; otherwise the layer computes as before."""
        return self.padding_mode == "zeros" and not isinstance(self.padding, str) and super().packs(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution (B, C_out, h', w') of x (B, C, h, w)."""
        if widens(x, self.weight) and self.padding_mode == "zeros" and not isinstance(self.padding, str):
            if self.suits_winograd(x):
                return self.ops.conv3x3_untransformed(x, self.weight, self.bias)
            return self.ops.convolution(x, self.weight, self.bias, self.geometry)
        if not self.packs(x):
            return self._conv_forward(x, self.weight, self.bias)
        x = x.contiguous(memory_format=CHANNELS_LAST)  # (B, C, h, w)
        if self.suits_winograd(x):
            return self._convolved_by_winograd(x)
        packed = self.from_weight("packed", lambda weight: self._pack(weight, x))
        return convolve_packed(x, packed[0], self.bias, self.geometry)

    def suits_winograd(self, x: Tensor, *, scale: int = 1) -> bool:
        """Return whether Winograd's convolution supports this layer and is faster for the map x.

        Args:
            x: The map, shape (B, C, h, w).
            scale: The sides of the map that is convolved, relative to those of x. Default: 1.
        """
        return (
            x.dtype == torch.float32
            and isinstance(self.ops, CompiledOps)
            and self.ops.supports(x)
            and has_winograd_shape(self, least=WIDE)
            and x.numel() * scale**2
            >= self.in_channels * (POSITIONS if self.keeps_transformed else 4 * POSITIONS)
        )

    @property
    def keeps_transformed(self) -> bool:
        """Whether transformed weights, of 36/9 times 4 bytes, are small enough to be kept."""
        return 16 * self.weight.numel() <= MOST_KEPT

    def _convolved_by_winograd(self, x: Tensor) -> Tensor:
        """Return the convolution of a map that `suits_winograd`."""
        assert isinstance(self.ops, CompiledOps)
        if self.spilled is None and self.keeps_transformed:
            weights = self.from_weight("transformed", self.ops.conv3x3_weights)
            return self.ops.conv3x3(x, weights, self.bias, self.out_channels)
        y = self.ops.conv3x3_untransformed(x, self.weight.detach(), self.bias)
        if self.spilled is not None:
            self.spilled.evict(self.weight)
        return y


def has_winograd_shape(conv: nn.Conv2d, *, least: int) -> bool:
    """Return whether a convolution is one of 3×3 with padding 1, of channels that the kernels support.

    Args:
        conv: The convolution.
        least: The least number of inputs and outputs.
    """
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return (
        shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        and min(conv.in_channels, conv.out_channels) >= least
        and conv.in_channels % 16 == conv.out_channels % 16 == 0
    )
