"""Where weights that were converted came from: tensors that are mapped from their file.

A parameter of another dtype than its file is a copy. The tensor that it was made of stays mapped here, which
takes address space and no memory, so that the parameter can be made again (`ldm.weights.adapters.originals`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from threading import Lock

import torch
from torch import Tensor, nn

from ldm.support.memory import in_file, release_unchanged
from ldm.weights.cast import CHUNK

_SOURCES: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # by the identity of a parameter
_CHANGING = Lock()


def remember_sources(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Remember what the parameters of a network were converted from.

    Args:
        module: The network.
        state: The tensors by the names of its parameters. Those that are not mapped from a file, or that the
            parameters themselves are, count as none.
    """
    made = {
        name: parameter
        for name, parameter in module.named_parameters()
        if name in state
        and parameter.device.type == "cpu"
        and state[name].is_contiguous()
        and state[name].data_ptr() != parameter.data_ptr()
    }
    found = in_file({name: state[name] for name in made})
    release_unchanged(state[name] for name in found)  # they were read to be converted
    for name in found:
        parameter, key = made[name], id(made[name])

        def forget(_: object, key: int = key) -> None:
            _SOURCES.pop(key, None)

        with _CHANGING:
            _SOURCES[key] = weakref.ref(parameter, forget), state[name].detach()


def mapped_source(parameter: Tensor) -> Tensor | None:
    """Return the tensor that a parameter can be made of again, bit for bit; None if there is none.

    The parameter is compared with it, as it may have been trained since.
    """
    known, source = _SOURCES.get(id(parameter), (None, None))
    if known is None or source is None or known() is not parameter:
        return None
    fits = parameter.shape == source.shape and parameter.is_contiguous() and parameter.device.type == "cpu"
    try:
        return source if fits and _makes(source, parameter.detach()) else None
    finally:
        release_unchanged([source])  # it was read to be compared


def _makes(source: Tensor, wanted: Tensor) -> bool:
    """Return whether a tensor, converted to the dtype of another one, has its bits."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.element_size()]
    between = torch.empty(min(CHUNK, wanted.numel()), dtype=wanted.dtype, device="cpu")
    pieces = zip(source.view(-1).split(CHUNK), wanted.view(-1).split(CHUNK), strict=True)
    return all(
        torch.equal(between[: len(piece)].copy_(piece).view(integers), own.view(integers))
        for piece, own in pieces
    )
