"""Build a ControlNet for a diffusion transformer from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from ldm.models.control.dit_control import DiTControl, DiTControlConfig
from ldm.models.dit import DiTConfig
from ldm.weights.controls.files import ControlFile
from ldm.weights.controls.shapes import shapes_in
from ldm.weights.keymap import Shape
from ldm.weights.parts import build_network, fill_network

HINT_KEY = "embed_hint.weight"  # marks such a file
CELL_HEAD_KEY = "head.embed_hint.weight"  # marks one with a head of its own


def is_dit_control(keys: Mapping[str, Shape]) -> bool:
    """Return whether a file with these keys is a ControlNet for a diffusion transformer."""
    return HINT_KEY in keys


def dit_control_config(shapes: Mapping[str, Shape], dit: DiTConfig, *, source: Path) -> DiTControlConfig:
    """Return the configuration of the ControlNet with these shapes, for a transformer.

    Raises:
        ValueError: If its hints are not cut into cells of the transformer's size, it has more blocks, or it
            has a head for exemplars, which the transformer does not have.
    """
    copied = [match[1] for key in shapes if (match := re.fullmatch(r"control_blocks\.(\d+)\.weight", key))]
    numbers, area = shapes[HINT_KEY][1] if len(shapes[HINT_KEY]) == 4 else 0, dit.cell**2
    if numbers % area or not numbers or not 1 <= len(copied) <= dit.depth:
        raise ValueError(
            f"{str(source)!r} copies {len(copied)} blocks and reads {numbers} numbers of a cell: expected up"
            f" to {dit.depth} blocks, as the transformer has, and a multiple of {area} numbers"
        )
    head = CELL_HEAD_KEY in shapes
    if head and not dit.slots:
        raise ValueError(f"{str(source)!r} is for a transformer with exemplars, which this one has not")
    return DiTControlConfig(dit=dit, blocks=len(copied), hint_channels=numbers // area, cell_head=head)


def build_dit_control(file: ControlFile, dit: DiTConfig, *, dtype: torch.dtype) -> DiTControl:
    """Return the ControlNet of a file, for a transformer.

    Args:
        file: The file, for which `is_dit_control` is true.
        dit: The transformer's configuration.
        dtype: Floating-point type of the weights.

    Raises:
        ValueError: If it was made for another transformer, keys are missing or misshapen, or numbers are not
            finite.
    """
    config = dit_control_config(shapes_in(file.tensors), dit, source=file.path)
    network = build_network(config)
    return cast(DiTControl, fill_network(network, file.tensors, "original", source=file.path, dtype=dtype))
