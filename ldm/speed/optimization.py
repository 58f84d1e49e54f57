"""`optimize` makes a pipeline faster on a CPU; `for_training` makes the training of a network faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from ldm.models.layers.resblock import ResBlock
from ldm.speed.backends import check_backend, remove_compiled, use_backend
from ldm.speed.blocks import FastGroupNorm, FastResBlock
from ldm.speed.fast_layers import COMPILED, FAST_LAYERS, exchange, exchange_back
from ldm.speed.few_rows import has_token_layers
from ldm.speed.int8 import check_int8, use_int8
from ldm.speed.kernels.build import NoKernels
from ldm.speed.kernels.ops import CompiledOps
from ldm.speed.merge import merge_tokens
from ldm.speed.networks import unets_and_decoders
from ldm.speed.presets import Approximations, settled
from ldm.speed.reuse import reuse_features
from ldm.speed.spill import release_all, take_turns
from ldm.speed.strips import StripDecoder
from ldm.speed.substitute import restore
from ldm.speed.training_conv import TrainingConv2d
from ldm.speed.widening import undo_widening, widen
from ldm.support.calls import Turns

P = TypeVar("P", bound=nn.Module)


@runtime_checkable
class HasNetworks(Protocol):
    """A pipeline, which names its networks."""

    def networks(self) -> Mapping[str, nn.Module]:
        """Return the networks by name."""


def optimize(
    pipe: P,
    *,
    preset: str | None = None,
    kernels: bool = True,
    memory: bool = False,
    reuse: int = 1,
    branch: int = 0,
    merge: float = 0.0,
    int8: bool = False,
    backend: str | None = None,
) -> P:
    """Make a pipeline, or a network, faster on a CPU, with the same results up to rounding.

    The classes of layers change; the parameters stay, can be changed and trained, and count from the next
    call on (docs/speed.md). On other devices than the CPU the layers compute as before. Each call replaces
    the options of the last one. `preset`, `reuse`, `merge` and `int8` change the results.

    Args:
        pipe: The pipeline or network, which is changed in place.
        preset: "exact", "fast" or "fastest" (`ldm.speed.presets`), in place of `reuse`, `branch`, `merge` and
            `int8`. Default: None, those options.
        kernels: Whether to use compiled kernels for attention, group norm and large convolutions, built with
            the package, or else once below LDM_HOME (default: ~/.cache/ldm). If neither is possible,
            PyTorch's operators are used. Default: True.
        memory: Whether to use the least memory, at some cost of time (Linux): the weights are in a file below
            LDM_HOME, and in packed form in memory while their network is in use; calls of several threads
            take turns; and decoding of very large images keeps one map instead of two. Default: False.
        reuse: Compute the deep part of the UNet or diffusion transformer in one of this many steps, and reuse
            it in the others (`ldm.speed.reuse.Reuse`). Default: 1, no reuse.
        branch: With `reuse`, the number of blocks at the network's beginning, and one less than those at its
            end, that are computed in every step. Default: 0.
        merge: Fraction of the positions, in [0, 0.75], that are merged in the largest self-attentions
            (`ldm.speed.merge.Merge`). Default: 0.
        int8: Whether UNets compute in 8 bits (`ldm.speed.int8`), or token decoders' weights. Default: False.
        backend: "compile" (torch.compile) or "openvino" (a separate package) to compute UNets and decoders;
            it excludes the other options. Default: None, ldm's own layers.

    Returns:
        `pipe`, whose attribute `optimizations` describes what was done.

    Raises:
        ValueError: If an argument is out of range, excludes another, or there is no network for it.
        ImportError: If the package of a backend is missing.
        RuntimeError: If a compiler, or 8-bit products, are missing.
    """
    reuse, branch, merge, int8 = settled(preset, Approximations(reuse, branch, merge, int8))
    _check(pipe, backend, excluded=memory or reuse != 1 or merge != 0 or int8, int8=int8)
    restore(pipe)
    undo_widening(pipe)
    remove_compiled(pipe)
    release_all(pipe)
    if backend is not None:
        exchange_back(pipe)
        return _described(pipe, use_backend(pipe, backend))
    approximations = (*reuse_features(pipe, reuse, branch), *merge_tokens(pipe, merge))
    exact = _exact_optimizations(exchange(pipe, kernels), memory, widen(pipe), has_token_layers(pipe))
    approximations += use_int8(pipe) if int8 else ()
    _set_memory(pipe, memory)
    return _described(pipe, *exact, *approximations)


def _check(pipe: nn.Module, backend: str | None, *, excluded: bool, int8: bool) -> None:
    """Raise an error for arguments of `optimize` that are not possible, before anything is changed."""
    check_backend(backend)
    if backend is not None and excluded:
        raise ValueError(
            f"backend {backend!r}: memory, reuse, merge and int8 act on ldm's own layers, expected"
            " backend=None with them"
        )
    if int8:
        check_int8(pipe)
    if backend is not None:
        unets_and_decoders(pipe)


def _set_memory(pipe: nn.Module, memory: bool) -> None:
    """Let a pipeline with exchanged layers use the least memory, or not."""
    for part in pipe.modules():
        if isinstance(part, StripDecoder):
            part.spare = memory
    pipe.__dict__.pop("turns", None)
    if memory:
        pipe.__dict__["turns"] = Turns()
        take_turns(pipe.networks().values() if isinstance(pipe, HasNetworks) else [pipe])


def _exact_optimizations(note: str, memory: bool, widening: tuple[str, ...], tokens: bool) -> tuple[str, ...]:
    """Return descriptions of the optimizations that do not change results.

    Args:
        note: From `exchange`.
        memory: Whether networks at rest are in a file.
        widening: From `widen`.
        tokens: Whether there are layers that are applied to a few rows.
    """
    folded = "doubling and 3×3 convolution: folded into four 2×2 convolutions"
    winograd = "3×3 convolutions of large maps in float32: Winograd's, compiled kernels"
    return (
        note,
        *(widening or ["linear and convolution weights: packed copies by oneDNN, maps channels last"]),
        *(["linear layers of a few rows: weights read in place"] if tokens else []),
        "GEGLU: inside its two products",
        "keys and values of the context: once per prompt",
        "decoding: large maps in strips of rows",
        *(["networks at rest: in a file"] if memory else [] if widening else [folded]),
        *([winograd] if note.startswith(COMPILED) and (widening or not memory) else []),
    )


def _described(pipe: P, *descriptions: str) -> P:
    """Set the attribute `optimizations` of a pipeline, and return the pipeline."""
    pipe.__dict__["optimizations"] = descriptions
    return pipe


def for_training(network: P) -> P:
    """Make the training of a network faster on a CPU, with the same function and gradients up to rounding.

    Maps are channels last, group norm with SiLU has compiled kernels for both passes, and 3×3 convolutions in
    float32 are Winograd's. Call it before the optimizer is created: it changes the memory layout of
    convolution weights, and the fused AdamW requires its moments in the layout of the weights
    (`ldm.training.checkpoint.match_strides`). Double backward is not supported.

    Args:
        network: The network, which is changed in place.

    Returns:
        `network`; unchanged if the kernels are not available (`ldm.speed.kernels.build`).
    """
    try:
        ops = CompiledOps()
    except NoKernels:
        return network
    for part in network.modules():
        if type(part) in (nn.GroupNorm, ResBlock):
            part.__class__ = FAST_LAYERS[type(part)]
            assert isinstance(part, FastGroupNorm | FastResBlock)
            part.ops = ops
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
        if type(part) is nn.Conv2d:
            part.__class__ = TrainingConv2d
            assert isinstance(part, TrainingConv2d)
            part.ops = ops
    return network
