"""Speed: `optimize` exchanges the layers of a pipeline's networks for faster ones that compute the same."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ldm.models.layers.attention import Attention, AttentionBlock
from ldm.models.layers.resblock import ResBlock, Upsample
from ldm.models.layers.transformer import GEGLU
from ldm.models.vae import VAEDecoder
from ldm.speed.approximate import merge_tokens, reuse_features
from ldm.speed.backends import check_backend, leave, networks, use
from ldm.speed.blocks import FastAttention, FastAttentionBlock, FastGroupNorm, FastResBlock
from ldm.speed.int8 import check_int8, eight_bits
from ldm.speed.kernels.build import NoKernels
from ldm.speed.kernels.ops import Native, Plain
from ldm.speed.packed import (
    ContextLinear,
    FastGEGLU,
    FoldedUpsample,
    HalvedLinear,
    Packed,
    PackedConv2d,
    PackedLinear,
)
from ldm.speed.spill import leave_turns, take_turns
from ldm.speed.strips import StripDecoder
from ldm.speed.substitute import restore

P = TypeVar("P", bound=nn.Module)
COMPILED = "attention and group norm with SiLU: compiled kernels"

EXCHANGED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PackedLinear,
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
    **{fast: plain for plain, fast in EXCHANGED.items()},
    ContextLinear: nn.Linear,
    HalvedLinear: nn.Linear,
}


def optimize(
    pipe: P,
    *,
    kernels: bool = True,
    memory: bool = False,
    reuse: int = 1,
    branch: int = 0,
    merge: float = 0.0,
    int8: bool = False,
    backend: str | None = None,
) -> P:
    """The pipeline (or network) itself, made faster on a CPU, its results the same up to the rounding of its
    dtype.

    Every layer keeps its parameters' names; only classes change, so a state dict, `ldm.save` and the code of
    the networks stay as they are. ``pipe.optimizations`` names what was done. ``kernels``: whether attention,
    group norm and large convolutions may be compiled with the machine's C++ compiler (once; they are kept
    below LDM_HOME, default ~/.cache/ldm); where that cannot be, PyTorch's operators serve, and
    ``optimizations`` says why. ``memory``: the least memory, at some cost of time (Linux): the networks take
    turns, the weights of those that rest lying in a file below LDM_HOME that ends with the process, and
    decoding of very large pictures keeps one map where it would keep two. On other devices than the CPU the
    layers compute as before.

    Three gains change the result and are off by default (errors: benchmarks/README.md). ``reuse``: the deep
    part of the UNet is computed in one step of this many, and used again in the others
    (`ldm.speed.approximate.Reuse`), which compute the last ``branch`` + 1 blocks of the way up and what these
    are joined with. ``merge``: the part of the positions, 0 to 0.75, that are merged with another in the
    largest self-attentions (`ldm.speed.approximate.Merge`). ``int8``: the UNet's products in 8 bits
    (`ldm.speed.int8`). Guidance has a fourth: `ldm.diffusion.guidance.cfg` with an ``interval``. The last
    call says what holds: without them the network is exact again.

    ``backend``: "compile" (torch.compile) or "openvino" (a package of its own) compute UNets and decoders in
    place of ldm's layers.

    Raises ValueError for a number that cannot be, what does not go together, or no UNet to act on;
    ImportError or RuntimeError where a backend or 8-bit products are missing.
    """
    check_backend(backend)
    if backend is not None and (memory or reuse != 1 or merge or int8):
        raise ValueError(
            f"backend {backend!r}: memory, reuse, merge and int8 act on ldm's own layers, expected"
            " backend=None with them"
        )
    if int8:
        check_int8(pipe)
    if backend is not None:
        networks(pipe)
    restore(pipe)
    leave(pipe)
    leave_turns(pipe)
    if backend is not None:
        exchange_back(pipe)
        pipe.optimizations = (use(pipe, backend),)
        return pipe
    gains = (*reuse_features(pipe, reuse, branch), *merge_tokens(pipe, merge))
    note = exchange(pipe, kernels)
    gains += eight_bits(pipe) if int8 else ()
    for part in pipe.modules():
        if isinstance(part, StripDecoder):
            part.spare = memory
    if memory:
        take_turns(pipe.networks().values() if hasattr(pipe, "networks") else [pipe])
    folds = "doubling and 3×3 convolution: folded into four 2×2 convolutions"
    winograds = (
        ("3×3 convolutions of large maps in float32: Winograd's, compiled kernels",)
        if note == COMPILED
        else ()
    )
    thrift = ("networks at rest: in a file",) if memory else (folds, *winograds)
    pipe.optimizations = (
        note,
        "linear and convolution weights: packed by oneDNN at the first call, maps channels last",
        "GEGLU: inside its two products",
        "keys and values of the context: once a prompt",
        "decoding: large maps in strips of rows",
        *thrift,
        *gains,
    )
    return pipe


def for_training(network: P) -> P:
    """The network itself, made faster to train on a CPU, its function and gradients the same up to rounding:
    maps are channels last, group norm with SiLU has compiled kernels forwards and backwards.

    Call this before the optimizer is made: it changes the memory layout of the convolutions' weights, and
    the fused AdamW needs its moments in the same layout (see `ldm.training.checkpoint.match_strides`). Double
    backward is not supported. Without kernels (`ldm.speed.kernels.build`) the network stays unchanged.
    """
    try:
        ops = Native()
    except NoKernels:
        return network
    for part in network.modules():
        if type(part) in (nn.GroupNorm, ResBlock):
            part.__class__ = EXCHANGED[type(part)]
            part.ops = ops
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
    return network


def exchange(pipe: nn.Module, kernels: bool) -> str:
    """Exchange the layers of a pipeline for fast ones; says what computes attention and group norm."""
    ops, note = Plain(), "attention and group norm: PyTorch's operators (kernels=False)"
    if kernels:
        try:
            ops, note = Native(), COMPILED
        except NoKernels as error:
            note = f"attention and group norm: PyTorch's operators, as kernels cannot be built ({error})"
    for part in list(pipe.modules()):
        if type(part) is Attention and part.cross:
            part.to_k.__class__ = part.to_v.__class__ = ContextLinear
        if type(part) is GEGLU:
            part.proj.__class__ = HalvedLinear
        if type(part) in EXCHANGED:
            part.__class__ = EXCHANGED[type(part)]
        if isinstance(part, FastAttention | FastGroupNorm | FastResBlock | StripDecoder | PackedConv2d):
            part.ops = ops
    return note


def exchange_back(pipe: nn.Module) -> None:
    """Exchange the layers back."""
    for part in list(pipe.modules()):
        if type(part) in PLAIN_LAYERS:
            if isinstance(part, Packed):
                part.unpack()
            for own in ("ops", "folded", "packed", "seen", "transformed", "spare"):
                part.__dict__.pop(own, None)
            part.__class__ = PLAIN_LAYERS[type(part)]
