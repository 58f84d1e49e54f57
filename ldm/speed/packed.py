"""Linear and convolution layers with weights in the memory layout in which oneDNN multiplies.

PyTorch's layers convert the weights in every call; these convert them once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.speed.kernels.ops import CHANNELS_LAST, CompiledOps, TorchOps, winograd_weights

mkldnn = torch.ops.mkldnn
# channels, and pixels of all maps together, from which Winograd's convolution is faster in float32
WIDE, POSITIONS = (128, 1024)


def packable(dtype: torch.dtype) -> bool:
    """Return whether oneDNN is available and packs weights of a dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())


def needs_gradient(x: Tensor) -> bool:
    """Return whether x requires a gradient, which packed layers and kernels do not compute."""
    return torch.is_grad_enabled() and x.requires_grad


class WeightFile(Protocol):
    """A file that holds plain weights, so that their pages may leave memory (`ldm.speed.spill.Spilled`)."""

    def separate_allocations(self) -> AbstractContextManager[None]:
        """Allocate blocks in pages of their own, inside a `with` block."""

    def evict(self, weight: Tensor) -> None:
        """Let the pages of a weight leave memory."""

    def release(self) -> None:
        """Move the weights back to memory."""


class Packed(nn.Module):
    """Base class of layers whose weight is packed at the first call, and replaces the plain weight.

    A state dict still contains the plain weight. Moving, loading, copying and gradients use the plain weight.

    Attributes:
        packed: The packed weights, or None before the first call.
        spilled: The file that holds the plain weight, from which it may leave memory. None to discard the
            plain weight when it is packed.
        parts: Number of equal parts of the weight, along the outputs, that are packed separately.
    """

    packed: list[Tensor] | None = None
    spilled: WeightFile | None = None
    parts = 1

    @property
    def weight(self) -> Tensor:
        """The plain weight, computed from the packed weights if it was discarded."""
        plain = self._parameters.get("weight")
        if plain is not None:
            return plain
        assert self.packed is not None
        return torch.cat([part.to_dense() for part in self.packed])

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # nn.Module.__setattr__ registers parameters without calling this; it makes the property writable
        self._parameters["weight"] = nn.Parameter(value, requires_grad=False)

    @property
    def trainable(self) -> bool:
        """Whether the weight requires a gradient, so that an optimizer may change it."""
        plain = self._parameters.get("weight")
        return plain is not None and plain.requires_grad

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return a weight packed for inputs of the shape of x."""
        raise NotImplementedError

    def packed_weights(self, x: Tensor) -> list[Tensor] | None:
        """Return the packed weights, packed now if necessary; None if the plain weight must be used."""
        if needs_gradient(x):
            return None
        if self.packed is None:
            weight = self._parameters["weight"]
            if (
                weight is None
                or {x.device.type, weight.device.type} != {"cpu"}
                or weight.dtype != x.dtype
                or not packable(x.dtype)
            ):
                return None
            if self.trainable:
                return None
            with nullcontext() if self.spilled is None else self.spilled.separate_allocations():
                self.packed = [
                    self.reorder(part.detach().contiguous(), x) for part in weight.chunk(self.parts)
                ]
            if self.spilled is not None:
                self.spilled.evict(weight)
            else:
                self._parameters["weight"] = None
        return self.packed if self.packed[0].dtype == x.dtype else None

    def unpack(self) -> None:
        """Replace the packed weights by the plain weight."""
        if self.packed is not None:
            weight, self.packed = self.weight, None
            if self._parameters["weight"] is None:
                self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # passed on unchanged
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return self.__dict__.copy()


class PackedLinear(Packed, nn.Linear):
    """Linear layer with packed weights."""

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return a weight packed for x (..., D)."""
        return mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., D_out) of x (..., D)."""
        packed = self.packed_weights(x)
        return (
            F.linear(x, self.weight, self.bias)
            if packed is None
            else mkldnn._linear_pointwise(x, packed[0], self.bias, "none", [], "")
        )


class ContextLinear(PackedLinear):
    """Projection of a context to keys or values, computed once while the context is the same tensor.

    Guidance passes the same tensor at every step, so that the projection runs once per prompt.

    Attributes:
        cached: A reference to the context, its version counter, and its projection; None before the first
            call.
    """

    cached: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection (B, M, D_out) of a context x (B, M, D)."""
        if torch.is_grad_enabled() or x.is_inference() or self.trainable:
            return super().forward(x)
        if self.cached is None or self.cached[0]() is not x or self.cached[1] != x._version:
            if self.spilled is None:
                projection = super().forward(x)
            else:  # used once per prompt, so the plain weight is read from the file
                projection = F.linear(x, self.weight, self.bias)
                self.spilled.evict(self.weight)
            self.cached = (weakref.ref(x), x._version, projection)
        return self.cached[2]

    def unpack(self) -> None:
        """Replace the packed weights by the plain weight, and discard the projection."""
        self.cached = None
        super().unpack()


class HalvedLinear(PackedLinear):
    """Linear layer whose outputs are two halves with packed weights of their own: GEGLU's value and gate."""

    parts = 2


class PackedConv2d(Packed, nn.Conv2d):
    """Convolution of channels-last maps with packed weights.

    In float32, 3×3 convolutions of large maps use Winograd's convolution if the compiled kernels are
    available.

    Attributes:
        ops: The operators; Winograd's convolution requires `CompiledOps`.
        transformed: Weights of Winograd's convolution. The packed weights are kept too, because only they
            restore the plain weight exactly.
    """

    ops: TorchOps | None = None
    transformed: Tensor | None = None

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return a weight packed for x (B, C, h, w)."""
        return mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution (B, C_out, h', w') of x (B, C, h, w)."""
        packed = self.packed_weights(x) if self.padding_mode == "zeros" else None
        if packed is None:
            return self._conv_forward(x, self.weight, self.bias)
        x = x.contiguous(memory_format=CHANNELS_LAST)  # (B, C, h, w)
        if isinstance(self.ops, CompiledOps) and self.ops.supports(x) and self.suits_winograd(x):
            if self.transformed is None:
                self.transformed = winograd_weights(self.weight)
            return self.ops.conv3x3(x, self.transformed, self.bias)
        return mkldnn._convolution_pointwise(
            x, packed[0], self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    def suits_winograd(self, x: Tensor) -> bool:
        """Return whether Winograd's convolution supports this layer and is faster for the map x."""
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        wide = (
            min(self.in_channels, self.out_channels) >= WIDE
            and self.in_channels % 16 == self.out_channels % 16 == 0
        )
        large = x.numel() >= POSITIONS * self.in_channels
        return (
            x.dtype == torch.float32
            and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
            and wide
            and large
            and self.spilled is None
        )

    def unpack(self) -> None:
        """Replace the packed weights, and those of Winograd's convolution, by the plain weight."""
        self.transformed = None
        super().unpack()
