"""Doubling and a 3×3 convolution, folded into four 2×2 convolutions of the small map.

Each pixel becomes four, each of which depends on 2×2 pixels of the small map; the 2×2 weights are sums of the
3×3 weights. This takes 4/9 of the products and 16/9 of the memory for weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.models.layers.resblock import Upsample
from ldm.models.meta import on_meta
from ldm.speed.packed import Packed, PackedConv2d, needs_gradient


class FoldedUpsample(Upsample):
    """Upsampling by folded convolutions.

    It computes the plain layer if a gradient is required, for sizes that are not doubled exactly, and if
    memory is saved (`ldm.optimize` with memory=True), because the folded weights are larger.

    Attributes:
        folded: The four convolutions, or None before the first call.
    """

    folded: list[PackedConv2d] | None = None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return x (B, C, h, w) at twice the size, or at `size`."""
        h, w = x.shape[-2:]
        saves_memory = isinstance(self.conv, Packed) and self.conv.spilled is not None
        if (
            saves_memory
            or needs_gradient(x)
            or self.conv.weight.requires_grad
            or (size is not None and tuple(size) != (2 * h, 2 * w))
        ):
            return super().forward(x, size)
        convs = self._folded_convolutions(x)
        out = x.new_empty(len(x), h, 2, w, 2, self.conv.out_channels)  # (B, h, 2, w, 2, C)
        for i, conv in enumerate(convs):
            down, right = divmod(i, 2)
            out[:, :, down, :, right] = conv(x).permute(0, 2, 3, 1)[:, down : down + h, right : right + w]
        return out.view(len(x), 2 * h, 2 * w, -1).permute(0, 3, 1, 2)

    def _folded_convolutions(self, x: Tensor) -> list[PackedConv2d]:
        """Return the four convolutions in the dtype and on the device of x, computed if necessary."""
        bias = None if self.folded is None else self.folded[0].bias
        if self.folded is None or bias is None or bias.dtype != x.dtype or bias.device != x.device:
            # in __dict__ and not a child module, so that the state dict holds only the 3×3 convolution
            self.__dict__["folded"] = fold(self.conv)
        assert self.folded is not None
        return self.folded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedUpsample:
        self.__dict__.pop("folded", None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # passed on unchanged
        self.__dict__.pop("folded", None)
        super()._load_from_state_dict(*args, **kwargs)


def fold(conv: nn.Conv2d) -> list[PackedConv2d]:
    """Return the 2×2 convolutions of the pixels above left, above right, below left and below right.

    The pixels above take the first row of weights for the previous row of the small map, and the sum of the
    other two for their own row. The pixels below take the sum of the first two for their own row, and the
    last for the next row.

    Args:
        conv: The 3×3 convolution.

    Returns:
        Four convolutions, each with outputs of shape (B, C, h + 1, w + 1).
    """
    assert conv.bias is not None
    weight = conv.weight.detach().float()  # (C, C, 3, 3)
    convs: list[PackedConv2d] = []
    for rows in _paired_sums(weight, 2):
        for kernel in _paired_sums(rows, 3):
            with on_meta():
                folded = nn.Conv2d(conv.in_channels, conv.out_channels, 2, padding=1)
            folded.__class__ = PackedConv2d
            folded._parameters["weight"] = nn.Parameter(kernel.to(conv.weight.dtype), requires_grad=False)
            folded._parameters["bias"] = nn.Parameter(conv.bias.detach(), requires_grad=False)
            convs.append(cast(PackedConv2d, folded))
    return convs


def _paired_sums(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the weights of the first and the second pixel of a doubled one, along a dimension of size 3."""
    before, own, after = weight.unbind(dim)
    return torch.stack([before, own + after], dim), torch.stack([before + own, after], dim)
