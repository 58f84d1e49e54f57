"""The choice of a model's dtype by its size and the memory that is free."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.registry.locating import RANDOM, resolve_card
from ldm.registry.sources import part_shapes
from ldm.support.config import nearest
from ldm.support.device import DTYPES, dtype_of, fast_dtype
from ldm.support.memory import free_memory
from ldm.support.text import shown
from ldm.weights.parts import build_network

AUTO = "auto"
# bytes of memory for each byte of the weights: `ldm.optimize` keeps packed copies beside weights that it does
# not widen, and larger ones for Winograd's convolutions
PACKED = 2.25
WORKING = 2**29 + 2**28  # bytes for the maps of an image of 512×512
logger = logging.getLogger(__name__)


class DtypeChoice(NamedTuple):
    """A dtype and the reason for it, in words."""

    dtype: torch.dtype
    reason: str


def count_parameters(shapes: Mapping[str, object]) -> int:
    """Return the number of parameters of networks, by their configurations."""
    return sum(p.numel() for config in shapes.values() for p in build_network(config).parameters())


def choose_dtype(parameters: int, device: torch.device) -> DtypeChoice:
    """Return the dtype for a model on a device.

    It is the fastest that is safe, if that is bfloat16, or if float32 fits in the memory that is free.
    Otherwise it is float16, whose rounding is an eighth of bfloat16's: `ldm.optimize` widens it on a CPU that
    does not multiply it, and GPUs multiply it.

    Args:
        parameters: Number of the model's parameters.
        device: Where the model computes.
    """
    fast, free = fast_dtype(device), free_memory(device)
    if fast != torch.float32:
        return DtypeChoice(fast, f"the {device.type} multiplies it")
    if free is None:
        return DtypeChoice(fast, f"the system does not state the free memory of {device.type}")
    factor = PACKED if device.type == "cpu" else 1.0
    need = int(4 * parameters * factor) + WORKING
    size = f"{parameters / 1e6:.0f} M parameters"
    facts = f"float32 needs about {need / 1e9:.1f} GB for {size}, free are {free / 1e9:.1f} GB"
    if need <= free:
        return DtypeChoice(fast, facts)
    narrow = 2 * parameters + WORKING
    if device.type == "cpu":
        facts += "; ldm.optimize widens the weights block by block"
    if narrow > free:
        facts += f"; float16 needs about {narrow / 1e9:.1f} GB, which is not free either"
        facts += ": ldm.optimize(pipe, memory=True) needs least" if device.type == "cpu" else ""
    return DtypeChoice(torch.float16, facts)


def settled_dtype(
    asked: str | torch.dtype | None, name: str | None, weights: str | Path | None, device: torch.device
) -> DtypeChoice:
    """Return the dtype that a model is loaded in, and say why if it is chosen by the free memory.

    Args:
        asked: A dtype or its name; "auto" for `choose_dtype`; None for the fastest that is safe.
        name: See `ldm.load`.
        weights: See `ldm.load`.
        device: Where the model computes.

    Raises:
        ValueError: If the name is unknown, or for "auto" with a card that states no shapes.
    """
    if asked is None:
        return DtypeChoice(fast_dtype(device), f"the fastest that is safe on {device.type}")
    if asked != AUTO:
        try:
            return DtypeChoice(dtype_of(asked), "it was asked for")
        except ValueError:
            raise ValueError(f"dtype {shown(asked)}; {nearest(str(asked), (AUTO, *DTYPES))}") from None
    card, embedded = resolve_card(name, weights)
    folder = embedded if weights in (None, RANDOM) else Path(weights)
    stated = folder is not None and (folder / "card.yaml").is_file()
    shapes = part_shapes(card, card.part_folders(folder) if folder is not None and stated else None)
    choice = choose_dtype(count_parameters(shapes), device)
    logger.info("%s: dtype %s: %s", card.name, str(choice.dtype).removeprefix("torch."), choice.reason)
    return choice
