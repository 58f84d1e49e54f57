"""Doubling and a 3×3 convolution, folded into four 2×2 convolutions of the small map.

Each pixel becomes four, each of which depends on 2×2 pixels of the small map; the 2×2 weights are sums of the
3×3 weights. This takes 4/9 of the products and 16/9 of the memory for weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.resblock import Upsample
from ldm.speed.kept_forms import clear_derived, derived
from ldm.speed.kernels.ops import CHANNELS_LAST
from ldm.speed.kernels.product import Geometry
from ldm.speed.packed import Packed, PackedConv2d, convolve_packed, needs_gradient, pack_kernel, packable

GEOMETRY = Geometry(padding=(1, 1), stride=(1, 1), dilation=(1, 1), groups=1)  # of the 2×2 convolutions


class FoldedUpsample(Upsample):
    """Upsampling by folded convolutions.

    The folded weights are made again when the weight of the 3×3 convolution has changed
    (`ldm.support.derived`). It computes the plain layer with derivatives, on other devices than the CPU, for
    sizes that are not doubled exactly, where Winograd's convolution of the doubled map takes fewer products,
    and if memory is saved (`ldm.optimize` with memory=True), because the folded weights are larger.
    """

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return x (B, C, h, w) at twice the size, or at `size`."""
        h, w = x.shape[-2:]
        if not self.folds(x) or (size is not None and tuple(size) != (2 * h, 2 * w)):
            return super().forward(x, size)
        weight, packs = self.conv.weight, packable(x.dtype)
        kernels: list[Tensor] = derived(self, "folded").of(
            [weight], lambda: [pack_kernel(k, GEOMETRY, x.shape) if packs else k for k in fold(weight)]
        )
        x = x.contiguous(memory_format=CHANNELS_LAST) if packs else x  # (B, C, h, w)
        out = x.new_empty(len(x), h, 2, w, 2, self.conv.out_channels)  # (B, h, 2, w, 2, C)
        for i, kernel in enumerate(kernels):
            down, right = divmod(i, 2)
            y = (
                convolve_packed(x, kernel, self.conv.bias, GEOMETRY)
                if packs
                else F.conv2d(x, kernel, self.conv.bias, padding=1)
            )  # (B, C, h + 1, w + 1)
            out[:, :, down, :, right] = y.permute(0, 2, 3, 1)[:, down : down + h, right : right + w]
        return out.view(len(x), 2 * h, 2 * w, -1).permute(0, 3, 1, 2)

    def folds(self, x: Tensor) -> bool:
        """Return whether x can be doubled by folded convolutions."""
        weight = self.conv._parameters.get("weight")
        return (
            type(weight) is nn.Parameter
            and x.numel() > 0
            and {x.device.type, weight.device.type} == {"cpu"}
            and weight.dtype == x.dtype
            and not (isinstance(self.conv, Packed) and self.conv.spilled is not None)
            and not (isinstance(self.conv, PackedConv2d) and self.conv.suits_winograd(x, scale=2))
            and not self.conv._forward_hooks  # which see the output of the 3×3 convolution
            and not needs_gradient(x, weight, self.conv.bias)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedUpsample:
        clear_derived(self)
        return super()._apply(fn, recurse)


def fold(weight: Tensor) -> list[Tensor]:
    """Return the 2×2 weights of the pixels above left, above right, below left and below right.

    The pixels above take the first row of weights for the previous row of the small map, and the sum of the
    other two for their own row. The pixels below take the sum of the first two for their own row, and the
    last for the next row.

    Args:
        weight: The 3×3 weight, shape (C, C, 3, 3).

    Returns:
        Four weights (C, C, 2, 2); with padding 1 the results have the shape (B, C, h + 1, w + 1).
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))  # (C, C, 3, 3)
    return [kernel.to(weight.dtype) for rows in _paired_sums(wide, 2) for kernel in _paired_sums(rows, 3)]


def _paired_sums(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the weights of the first and the second pixel of a doubled one, along a dimension of size 3."""
    before, own, after = weight.unbind(dim)
    return torch.stack([before, own + after], dim), torch.stack([before + own, after], dim)
