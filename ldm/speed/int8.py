"""Products of 8-bit weights and activations, by oneDNN: convolutions in two thirds of bfloat16's time, with
an error of a hundredth a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.layers.resblock import Upsample
from ldm.models.layers.transformer import GEGLU, SpatialTransformer
from ldm.speed.approximate import unets
from ldm.speed.packed import ContextLinear, Packed, with_grad
from ldm.speed.substitute import Substitute


class Quantised:
    """A weight in 8 bits, symmetric, with a scale for each output, in oneDNN's order; and its bias."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d | None, shape: tuple[int, ...]
    ) -> None:
        wide = weight.detach().float()
        self.scale = (wide.flatten(1).abs().amax(dim=1) / 127).clamp_min(1e-30)  # (outputs,)
        eighth = (wide / self.scale.view(-1, *[1] * (wide.ndim - 1))).round().to(torch.int8)
        self.zero, self.bias, self.conv = (
            torch.zeros(len(wide), dtype=torch.long),
            None if bias is None else bias.detach().float(),
            conv,
        )
        if conv is None:
            self.weight = torch.ops.onednn.qlinear_prepack(
                eighth, [torch.Size(shape[:-1]).numel(), shape[-1]]
            )
        else:
            where = (conv.stride, conv.padding, conv.dilation, conv.groups)
            self.weight = torch.ops.onednn.qconv_prepack(eighth, self.scale, 1.0, 0, *where, list(shape))

    def __call__(self, x: Tensor, scale: float, zero: int, dtype: torch.dtype, post: str = "none") -> Tensor:
        """The product with what `quantise` gave, in a dtype; ``post``: "none" or "gelu"."""
        given, last = (
            (x, scale, zero, self.weight, self.scale, self.zero, self.bias),
            (
                1.0,
                0,
                dtype,
                post,
                [],
                "none" if post == "gelu" else "",
            ),
        )
        if self.conv is None:
            return torch.ops.onednn.qlinear_pointwise(*given, *last)
        return torch.ops.onednn.qconv2d_pointwise(
            *given, self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups, *last
        )


def quantise(x: Tensor) -> tuple[Tensor, float, int]:
    """(q, scale, zero): x ≈ scale·(q − zero), q of 8 bits without sign, for the range of this very x and
    0."""
    low, high = (float(v) for v in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-30)
    zero = round(-low / scale)
    # cutting off rounds, by the half
    q = x.to(torch.float32, copy=True).mul_(1 / scale).add_(zero + 0.5).clamp_(0, 255).to(torch.uint8)
    return q, scale, zero


class Int8(Substitute):
    """A linear layer, a convolution or a GEGLU by products in 8 bits; by its own forward where a gradient is
    wanted or off the CPU.

    The plain weight stays, for state dicts and copies: weights take half as much memory again as in bfloat16.
    """

    layers: list[Quantised] | None = None
    seen: tuple[Any, int] | None = (
        None  # the weight that they were made of, and how often it had been written to
    )

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.layer = module.proj if isinstance(module, GEGLU) else module
        if isinstance(self.layer, Packed):
            self.layer.unpack()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("layers", "seen")}

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if (
            with_grad(x)
            or weight.requires_grad
            or {x.device.type, weight.device.type} != {"cpu"}
            or not x.numel()
        ):
            return self.plain(x)
        conv = self.layer if isinstance(self.layer, nn.Conv2d) else None
        x = x if conv is None else x.contiguous(memory_format=torch.channels_last)
        if (
            self.layers is None
            or self.seen is None
            or self.seen[0] is not weight
            or self.seen[1] != weight._version
        ):
            bias, parts = self.layer.bias, 2 if isinstance(self.module, GEGLU) else 1
            halves = zip(weight.chunk(parts), [None] if bias is None else bias.chunk(parts), strict=True)
            self.layers = [Quantised(w, b, conv, tuple(x.shape)) for w, b in halves]
            self.seen = weight, weight._version
        q = quantise(x)
        if len(self.layers) == 1:
            return self.layers[0](*q, x.dtype)
        return self.layers[1](*q, x.dtype, "gelu").mul_(self.layers[0](*q, x.dtype))


def check_int8(pipe: nn.Module) -> None:
    """RuntimeError where this torch or processor has no products of 8 bits, ValueError where there is no UNet
    to use them."""
    unets(pipe)
    if (
        not hasattr(torch.ops.onednn, "qconv2d_pointwise")
        or not torch.backends.mkldnn.is_available()
        or not torch.cpu._is_vnni_supported()
    ):
        raise RuntimeError(
            "int8: expected a processor with AVX-512 VNNI and a torch with oneDNN's 8-bit products (2.7 or"
            " later)"
        )


def eight_bits(pipe: nn.Module) -> tuple[str, ...]:
    """Have the blocks of a pipeline's UNets compute in 8 bits; says what was done.

    As they are stay the first and the last convolution, what embeds times and conditions, keys and values of
    the context (once a prompt) and the convolutions behind doubling, which folding has made as cheap.
    """
    for net in unets(pipe):
        for block in (*net.down_blocks, *net.up_blocks, net.mid_block):
            doubling = {part.conv for part in block.modules() if isinstance(part, Upsample)}
            for part in block.modules():
                if isinstance(part, nn.Conv2d) and part not in doubling and part.groups == 1:
                    Int8(part)
                elif isinstance(part, SpatialTransformer):
                    _linears(part)
    return (
        "int8: weights and activations of the UNet's convolutions and transformers in 8 bits (approximate)",
    )


def _linears(transformer: nn.Module) -> None:
    """The linear layers of a transformer, the two halves of GEGLU by one."""
    halved = {part.proj for part in transformer.modules() if isinstance(part, GEGLU)}
    for part in transformer.modules():
        if isinstance(part, GEGLU) or (
            isinstance(part, nn.Linear) and part not in halved and not isinstance(part, ContextLinear)
        ):
            Int8(part)
