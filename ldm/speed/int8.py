"""Products of 8-bit weights and activations by oneDNN.

They change the result. Convolutions take two thirds of the time in bfloat16, with a relative error of about
0.01 per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.models.layers.resblock import Upsample
from ldm.models.layers.transformer import GEGLU, SpatialTransformer
from ldm.speed.few_rows import has_token_layers, use_octets
from ldm.speed.kept_forms import clear_derived
from ldm.speed.networks import unets
from ldm.speed.packed import ContextLinear, needs_gradient
from ldm.speed.substitute import Substitute
from ldm.support.derived import Derived


class Quantised:
    """An 8-bit weight, symmetric, with one scale per output, in oneDNN's layout; and its bias.

    Args:
        weight: Shape (C_out, C) or (C_out, C, h, w).
        bias: Shape (C_out,), or None.
        conv: The convolution whose stride and padding are used. None for a linear layer.
        shape: Shape of the input that the layout is chosen for.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d | None, shape: tuple[int, ...]
    ) -> None:
        wide = weight.detach().float()
        self.scale = (wide.flatten(1).abs().amax(dim=1) / 127).clamp_min(1e-30)  # (C_out,)
        quantised = (wide / self.scale.view(-1, *[1] * (wide.ndim - 1))).round().to(torch.int8)
        self.zero = torch.zeros(len(wide), dtype=torch.long, device=wide.device)  # (C_out,)
        self.bias = None if bias is None else bias.detach().float()
        self.conv = conv
        if conv is None:
            self.weight = torch.ops.onednn.qlinear_prepack(
                quantised, [torch.Size(shape[:-1]).numel(), shape[-1]]
            )
        else:
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            self.weight = torch.ops.onednn.qconv_prepack(
                quantised, self.scale, 1.0, 0, *geometry, list(shape)
            )

    def __call__(self, x: Tensor, scale: float, zero: int, dtype: torch.dtype, post: str = "none") -> Tensor:
        """Return the product with a quantised input.

        Args:
            x: The input from `quantise`, uint8.
            scale: Its scale.
            zero: Its zero point.
            dtype: Dtype of the result.
            post: Activation that is applied to the result, "none" or "gelu". Default: "none".
        """
        operands = (x, scale, zero, self.weight, self.scale, self.zero, self.bias)
        no_scalars: list[float] = []  # the activations have no parameters
        output = (1.0, 0, dtype, post, no_scalars, "none" if post == "gelu" else "")
        if self.conv is None:
            return torch.ops.onednn.qlinear_pointwise(*operands, *output)
        return torch.ops.onednn.qconv2d_pointwise(
            *operands, self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups, *output
        )


def quantise(x: Tensor) -> tuple[Tensor, float, int]:
    """Return (q, scale, zero) such that x ≈ scale·(q − zero), with q uint8, for the range of x and 0."""
    low, high = (float(v) for v in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-30)
    zero = round(-low / scale)
    # the conversion to uint8 truncates, so adding 0.5 rounds
    q = x.to(torch.float32, copy=True).mul_(1 / scale).add_(zero + 0.5).clamp_(0, 255).to(torch.uint8)
    return q, scale, zero


class Int8(Substitute[nn.Module]):
    """Forward of a linear layer, a convolution or a GEGLU by 8-bit products.

    The module computes its own forward with derivatives, so that training sees the exact layer, and on other
    devices than the CPU. The plain weight stays, so weights take 1.5 times their memory in bfloat16.

    Attributes:
        layers: The quantised weights, two for a GEGLU; made again when the weight or the bias has changed.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d | GEGLU) -> None:
        super().__init__(module)
        self.layer = module.proj if isinstance(module, GEGLU) else module
        self.layers: Derived[list[Quantised]] = Derived()
        clear_derived(self.layer)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer._parameters.get("weight"), self.layer.bias
        if (
            type(weight) is not nn.Parameter
            or needs_gradient(x, weight, bias)
            or {x.device.type, weight.device.type} != {"cpu"}
            or not x.numel()
        ):
            return self.original_forward(x)
        conv = self.layer if isinstance(self.layer, nn.Conv2d) else None
        x = x if conv is None else x.contiguous(memory_format=torch.channels_last)
        sources = [weight] if bias is None else [weight, bias]
        layers = self.layers.of(sources, lambda: self._quantised(weight, bias, tuple(x.shape)))
        q = quantise(x)
        if len(layers) == 1:
            return layers[0](*q, x.dtype)
        return layers[1](*q, x.dtype, "gelu").mul_(layers[0](*q, x.dtype))

    def _quantised(self, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> list[Quantised]:
        """Return the quantised weights for inputs of a shape."""
        conv = self.layer if isinstance(self.layer, nn.Conv2d) else None
        parts = 2 if isinstance(self.module, GEGLU) else 1
        biases = [None] * parts if bias is None else bias.chunk(parts)
        return [Quantised(w, b, conv, shape) for w, b in zip(weight.chunk(parts), biases, strict=True)]


def check_int8(pipe: nn.Module) -> None:
    """Raise an error if a pipeline cannot use 8-bit products on this machine.

    Raises:
        RuntimeError: If torch or the processor lacks 8-bit products.
        ValueError: If the pipeline has neither a UNet nor layers for a few rows.
    """
    if has_token_layers(pipe):
        return
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


def use_int8(pipe: nn.Module) -> tuple[str, ...]:
    """Let the blocks of a pipeline's UNets compute in 8 bits, or the layers of a decoder of tokens.

    Unchanged are the first and the last convolution, the embeddings of times and conditions, the keys and
    values of the context, which are computed once per prompt, and the convolutions after doubling, which
    folding has made as fast.

    Returns:
        A description of what was done.
    """
    if has_token_layers(pipe):
        return use_octets(pipe)
    for net in unets(pipe):
        for block in (*net.down_blocks, *net.up_blocks, net.mid_block):
            doubling = {part.conv for part in block.modules() if isinstance(part, Upsample)}
            for part in block.modules():
                if isinstance(part, nn.Conv2d) and part not in doubling and part.groups == 1:
                    Int8(part)
                elif isinstance(part, SpatialTransformer):
                    _use_int8_linears(part)
    return (
        "int8: weights and activations of the UNet's convolutions and transformers in 8 bits (approximate)",
    )


def _use_int8_linears(transformer: nn.Module) -> None:
    """Let the linear layers of a transformer compute in 8 bits, the two halves of a GEGLU together."""
    halved = {part.proj for part in transformer.modules() if isinstance(part, GEGLU)}
    for part in transformer.modules():
        if isinstance(part, GEGLU) or (
            isinstance(part, nn.Linear) and part not in halved and not isinstance(part, ContextLinear)
        ):
            Int8(part)
