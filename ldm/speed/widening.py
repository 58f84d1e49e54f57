"""Networks whose parameters have 16 bits, on a processor that does not multiply 16-bit numbers.

The parameters keep their dtype and the networks compute in float32: each product widens its weights block by
block (`ldm.speed.kernels.product`). The result is that of the float32 network with the rounded weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.speed.kernels.product import widened
from ldm.support.device import COMPUTES_IN, fast_dtype


class WideLayerNorm(nn.LayerNorm):
    """Layer norm whose weight and bias are widened to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x (..., *normalized_shape)."""
        weight, bias = widened(x, self.weight), widened(x, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class WideEmbedding(nn.Embedding):
    """Embedding whose rows are widened to float32."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (*, D) of ids (*)."""
        return super().forward(ids).float()


WIDE_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: WideLayerNorm,
    nn.Embedding: WideEmbedding,
}
NARROW_LAYERS = {wide: narrow for narrow, wide in WIDE_LAYERS.items()}


def widen(pipe: nn.Module) -> tuple[str, ...]:
    """Let a pipeline compute in float32 with parameters of 16 bits, if the processor asks for it.

    Its fast layers are in place already (`ldm.speed.fast_layers.exchange`). Nothing changes for parameters in
    float32, in a dtype that the processor multiplies, or on other devices.

    Args:
        pipe: The pipeline, or a network.

    Returns:
        A description of what was done; empty if nothing was.
    """
    fast = fast_dtype("cpu")
    dtypes = {
        p.dtype
        for p in pipe.parameters()
        if p.device.type == "cpu" and p.dtype in (torch.bfloat16, torch.float16)
    } - {fast}
    if not dtypes:
        return ()
    for part in pipe.modules():
        part.__dict__[COMPUTES_IN] = torch.float32
        if type(part) in WIDE_LAYERS:
            part.__class__ = WIDE_LAYERS[type(part)]
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return (
        f"weights in {names}: widened to float32 block by block in each product, as this processor does not"
        f" multiply {names}",
    )


def undo_widening(pipe: nn.Module) -> None:
    """Undo `widen`."""
    for part in pipe.modules():
        part.__dict__.pop(COMPUTES_IN, None)
        if type(part) in NARROW_LAYERS:
            part.__class__ = NARROW_LAYERS[type(part)]
