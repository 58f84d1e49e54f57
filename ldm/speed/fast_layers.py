"""Exchange of the layers of a network for faster ones that compute the same function, and back.

Only the classes of modules change, so parameters keep their names.
"""

from __future__ import annotations

from torch import nn

from ldm.models.dalle.layers import TokenLinear
from ldm.models.layers.attention import Attention, AttentionBlock
from ldm.models.layers.resblock import ResBlock, Upsample
from ldm.models.layers.transformer import GEGLU
from ldm.models.vae import VAEDecoder
from ldm.speed.blocks import FastAttention, FastAttentionBlock, FastGEGLU, FastGroupNorm, FastResBlock
from ldm.speed.few_rows import FewRowsLinear
from ldm.speed.folded import FoldedUpsample
from ldm.speed.kernels.build import NoKernels
from ldm.speed.kernels.choice import described, kernel_choice
from ldm.speed.kernels.ops import CompiledOps, TorchOps
from ldm.speed.packed import ContextLinear, HalvedLinear, Packed, PackedConv2d, PackedLinear
from ldm.speed.strips import StripDecoder
from ldm.speed.training_conv import TrainingConv2d

COMPILED = "attention and group norm with SiLU: compiled kernels, "

FAST_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PackedLinear,
    TokenLinear: FewRowsLinear,
    nn.Conv2d: PackedConv2d,
    nn.GroupNorm: FastGroupNorm,
    GEGLU: FastGEGLU,
    ResBlock: FastResBlock,
    Attention: FastAttention,
    AttentionBlock: FastAttentionBlock,
    Upsample: FoldedUpsample,
    VAEDecoder: StripDecoder,
}
PLAIN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    **{fast: plain for plain, fast in FAST_LAYERS.items()},
    ContextLinear: nn.Linear,
    HalvedLinear: nn.Linear,
    TrainingConv2d: nn.Conv2d,
}
# attributes that fast layers add to their modules
FAST_ATTRIBUTES = ("ops", "folded", "packed", "transformed", "rounded", "octets", "spare", "spilled")


def exchange(pipe: nn.Module, kernels: bool) -> str:
    """Exchange the layers of a pipeline for fast ones.

    Args:
        pipe: The pipeline, or a network.
        kernels: Whether to use compiled kernels if they are available.

    Returns:
        A description of what computes attention and group norm; it starts with `COMPILED` if the kernels do.
    """
    ops, note = TorchOps(), "attention and group norm: PyTorch's operators (kernels=False)"
    if kernels:
        try:
            ops, note = CompiledOps(), COMPILED + described(kernel_choice())
        except NoKernels as error:
            note = f"attention and group norm: PyTorch's operators, as kernels cannot be built ({error})"
    for part in list(pipe.modules()):
        if type(part) is Attention and part.cross:
            part.to_k.__class__ = part.to_v.__class__ = ContextLinear
        if type(part) is GEGLU:
            part.proj.__class__ = HalvedLinear
        if type(part) in FAST_LAYERS:
            part.__class__ = FAST_LAYERS[type(part)]
        part.__dict__.pop("octets", None)  # an option of the last call
        if isinstance(part, FastAttention | FastGroupNorm | FastResBlock | StripDecoder | Packed):
            part.ops = ops
    return note


def exchange_like(network: nn.Module, other: nn.Module) -> None:
    """Exchange the layers of a network for fast ones if those of another network are.

    Args:
        network: The network, which is changed in place.
        other: The network that it follows, with convolutions and group norms.
    """
    parts = list(other.modules())
    if any(isinstance(part, PackedConv2d) for part in parts):
        norms = (part for part in parts if isinstance(part, FastGroupNorm))
        exchange(network, any(isinstance(norm.ops, CompiledOps) for norm in norms))


def exchange_back(pipe: nn.Module) -> None:
    """Exchange fast layers for plain ones."""
    for part in list(pipe.modules()):
        if type(part) in PLAIN_LAYERS:
            for name in FAST_ATTRIBUTES:
                part.__dict__.pop(name, None)
            part.__class__ = PLAIN_LAYERS[type(part)]
