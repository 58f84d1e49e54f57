"""Linear and convolution layers whose weights are kept in the order that oneDNN multiplies in, so that no
call puts them in order again."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.resblock import Upsample
from ldm.models.layers.transformer import GEGLU
from ldm.models.meta import on_meta
from ldm.speed.kernels.ops import CHANNELS_LAST, Native, Plain, winograd

mkldnn = torch.ops.mkldnn
# channels, and pixels of all maps together, from which on Winograd's way is taken in float32
WIDE, POSITIONS = (128, 1024)


def packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and packs weights of a dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())


def with_grad(x: Tensor) -> bool:
    """Whether a gradient must flow through x, which packed layers and kernels have none for."""
    return torch.is_grad_enabled() and x.requires_grad


class WeightFile(Protocol):
    """A file that holds plain weights, so that their pages may leave memory (`ldm.speed.spill.Spilled`)."""

    def apart(self) -> AbstractContextManager[None]:
        """Give blocks that are allocated inside pages of their own."""

    def evict(self, weight: Tensor) -> None:
        """Let the pages of a weight leave memory."""


class Packed(nn.Module):
    """A layer whose weight is packed at the first call, in the place of the plain one; a state dict still
    holds the plain one.

    Moving, loading, copying and gradients go by the plain weight.
    """

    packed: list[Tensor] | None = None
    spilled: WeightFile | None = (
        None  # where the plain weight lies in a file, and is let leave memory; else it is given up
    )
    parts = 1  # the packed weights are the plain one's equal parts along the outputs

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The plain weight."""
        own = self._parameters.get("weight")
        if own is not None or self.packed is None:
            return own  # type: ignore[return-value]
        return torch.cat([part.to_dense() for part in self.packed])

    @property
    def learns(self) -> bool:
        """Whether the weight is being trained: an optimiser holds it, and changes it."""
        own = self._parameters.get("weight")
        return own is not None and own.requires_grad

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """A weight in the order that is best for an input."""
        raise NotImplementedError

    def packs(self, x: Tensor) -> list[Tensor] | None:
        """The packed weights, made now if need be; None where the plain one must serve."""
        if with_grad(x):
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
            if self.learns:
                return None
            with nullcontext() if self.spilled is None else self.spilled.apart():
                self.packed = [
                    self.reorder(part.detach().contiguous(), x) for part in weight.chunk(self.parts)
                ]
            if self.spilled is not None:
                self.spilled.evict(weight)
            else:
                self._parameters["weight"] = None
        return self.packed if self.packed[0].dtype == x.dtype else None

    def unpack(self) -> None:
        """Back to the plain weight."""
        if self.packed is not None:
            weight, self.packed = self.weight, None
            if self._parameters["weight"] is None:
                self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return self.__dict__.copy()


class PackedLinear(Packed, nn.Linear):
    """A linear layer."""

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        return mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packs(x)
        return (
            F.linear(x, self.weight, self.bias)
            if packed is None
            else mkldnn._linear_pointwise(x, packed[0], self.bias, "none", [], "")
        )


class ContextLinear(PackedLinear):
    """The keys or values of a context, computed once while the context is the very same tensor: once a
    prompt, not once a step."""

    seen: tuple[Any, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.is_inference() or self.learns:
            return super().forward(x)
        if self.seen is None or self.seen[0]() is not x or self.seen[1] != x._version:
            if self.spilled is None:
                made = super().forward(x)
            else:  # used once a prompt: read from the file as it is
                made = F.linear(x, self.weight, self.bias)
                self.spilled.evict(self.weight)
            self.seen = (weakref.ref(x), x._version, made)
        return self.seen[2]

    def unpack(self) -> None:
        self.seen = None
        super().unpack()


class HalvedLinear(PackedLinear):
    """A linear layer whose outputs are two halves, each with a weight of its own: GEGLU's value and gate."""

    parts = 2


class FastGEGLU(GEGLU):
    """value · gelu(gate), both inside the products that make them: the pair of them, twice as wide as the
    result, is never in memory."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.proj.packs(x) if isinstance(self.proj, HalvedLinear) else None
        if packed is None:
            value, gate = F.linear(x, self.proj.weight, self.proj.bias).chunk(2, dim=-1)
            return value * F.gelu(gate)
        value_bias, gate_bias = self.proj.bias.chunk(2)
        gate = mkldnn._linear_pointwise(x, packed[1], gate_bias, "gelu", [], "none")
        return mkldnn._linear_pointwise.binary(x, gate, packed[0], value_bias, "mul")


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution of channels-last maps; in float32, of 3×3 and large maps, by Winograd's way where kernels
    are compiled."""

    ops: Plain | None = None
    transformed: Tensor | None = (
        # Winograd's weights; the packed ones stay beside them, for they alone give the plain ones back to the
        # bit
        None
    )

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        return mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
        )

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packs(x) if self.padding_mode == "zeros" else None
        if packed is None:
            return self._conv_forward(x, self.weight, self.bias)
        x = x.contiguous(memory_format=CHANNELS_LAST)
        if isinstance(self.ops, Native) and self.ops.takes(x) and self.winograds(x):
            if self.transformed is None:
                self.transformed = winograd(self.weight)
            return self.ops.conv3x3(x, self.transformed, self.bias)
        return mkldnn._convolution_pointwise(
            x, packed[0], self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    def winograds(self, x: Tensor) -> bool:
        """Whether Winograd's way is there for this convolution of a map, and the sooner one."""
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
        self.transformed = None
        super().unpack()


class FoldedUpsample(Upsample):
    """Doubling and the 3×3 convolution in one: each of the four pixels that a pixel becomes sees 2×2 pixels
    of the small map, so four 2×2 convolutions, whose weights are sums of the 3×3 one's, give the same with
    4/9 of the products, and are 16/9 as large: not where memory is to be spared.
    """

    folded: list[PackedConv2d] | None = None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        h, w = x.shape[-2:]
        spared = isinstance(self.conv, Packed) and self.conv.spilled is not None
        if (
            spared
            or with_grad(x)
            or self.conv.weight.requires_grad
            or (size is not None and tuple(size) != (2 * h, 2 * w))
        ):
            return super().forward(x, size)
        if (
            self.folded is None
            or self.folded[0].bias.dtype != x.dtype
            or self.folded[0].bias.device != x.device
        ):
            # not a child: a state dict holds the 3×3 convolution alone
            self.__dict__["folded"] = fold(self.conv)
        assert self.folded is not None
        out = x.new_empty(len(x), h, 2, w, 2, self.conv.out_channels)
        for i, conv in enumerate(self.folded):
            down, right = divmod(i, 2)
            out[:, :, down, :, right] = conv(x).permute(0, 2, 3, 1)[:, down : down + h, right : right + w]
        return out.view(len(x), 2 * h, 2 * w, -1).permute(0, 3, 1, 2)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__.pop("folded", None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("folded", None)
        super()._load_from_state_dict(*args, **kwargs)


def fold(conv: nn.Conv2d) -> list[PackedConv2d]:
    """The 2×2 convolutions of the pixels above left, above right, below left and below right; each gives (h +
    1) × (w + 1) outputs.

    Above, the first row of weights meets the row before and the other two the pixel's own; below, the first
    two its own and the last the next.
    """
    weight = conv.weight.detach().float()
    convs: list[PackedConv2d] = []
    for rows in _pairs(weight, 2):
        for kernel in _pairs(rows, 3):
            with on_meta():
                made = nn.Conv2d(conv.in_channels, conv.out_channels, 2, padding=1)
            made.__class__ = PackedConv2d
            made._parameters["weight"] = nn.Parameter(kernel.to(conv.weight.dtype), requires_grad=False)
            made._parameters["bias"] = nn.Parameter(conv.bias.detach(), requires_grad=False)
            convs.append(cast(PackedConv2d, made))
    return convs


def _pairs(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three weights along a dimension as the two that the first and the second pixel of a doubled one see."""
    before, own, behind = weight.unbind(dim)
    return torch.stack([before, own + behind], dim), torch.stack([before + own, behind], dim)
