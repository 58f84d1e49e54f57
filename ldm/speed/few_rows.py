"""Linear layers for a few rows, such as one token of each image: the weights are read in place.

Reading the weights takes the time, so they need no packed copy: a kernel multiplies all rows with each weight
as it is read, in 32, 16 or 8 bits, and sums in float32. Weights of 8 bits are copies with one scale for each
output; activations are not rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.dalle.layers import TokenLinear
from ldm.speed.kernels.product import widens
from ldm.speed.packed import Packed, needs_gradient

MOST_ROWS = 32  # above it, a matrix product is faster


class FewRowsLinear(Packed, TokenLinear):
    """Linear layer without bias that reads its weight once for a few rows.

    Attributes:
        octets: Whether the products with a few rows are with weights of 8 bits.
    """

    octets = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., D_out) of x (..., D)."""
        weight, few = self.weight, 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        if not self.computes(x) or not few:
            return self.ops.linear(x, weight, None) if widens(x, weight) else F.linear(x, weight)
        if self.octets:
            rounded, scale = self.from_weight("rounded", round_to_octets)
            return self.ops.few_rows(x, rounded, scale)
        return self.ops.few_rows(x, weight.detach())

    def computes(self, x: Tensor) -> bool:
        """Return whether the kernel may see x; otherwise the layer computes as before."""
        weight = self._parameters.get("weight")
        return (
            type(weight) is nn.Parameter
            and {x.device.type, weight.device.type} == {"cpu"}
            and (weight.dtype == x.dtype or widens(x, weight))
            and not needs_gradient(x, weight)
        )


def round_to_octets(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (D_out, D) in whole numbers of 8 bits, and the scale (D_out,) of each output."""
    scale = (weight.abs().amax(dim=1).float() / 127).clamp_min(1e-30)  # (D_out,)
    rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for out, part, s in zip(rounded.split(4096), weight.split(4096), scale.split(4096), strict=True):
        out.copy_((part.float() / s[:, None]).round_())
    return rounded, scale


def few_rows_layers(pipe: nn.Module) -> list[FewRowsLinear]:
    """Return the layers of a pipeline that are applied to a few rows."""
    return [part for part in pipe.modules() if isinstance(part, FewRowsLinear)]


def has_token_layers(pipe: nn.Module) -> bool:
    """Return whether a pipeline has layers that are applied to a few rows, fast or not."""
    return any(isinstance(part, TokenLinear) for part in pipe.modules())


def use_octets(pipe: nn.Module) -> tuple[str, ...]:
    """Let the layers of a pipeline that are applied to a few rows multiply with weights of 8 bits.

    Returns:
        A description of what was done; empty if there are no such layers.
    """
    layers = few_rows_layers(pipe)
    for layer in layers:
        layer.octets = True
    return ("int8: weights of the token decoder in 8 bits, sums in float32 (approximate)",) if layers else ()
