"""The exported file of an adapter, and the record beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ldm.support.config import to_dict
from ldm.support.files import write_atomically
from ldm.support.strict_yaml import format_yaml
from ldm.weights.formats.ldm_folder import narrow
from ldm.weights.formats.safetensors import sha256, write_safetensors
from ldm.weights.parts import Layout, to_layout


def write_network(
    path: Path,
    network: nn.Module,
    dtype: Literal["float16", "float32"],
    facts: Mapping[str, str],
    *,
    layout: Layout = "original",
) -> None:
    """Write the network of a control as a .safetensors file, after making its folder.

    Args:
        path: The file.
        network: The network.
        dtype: Floating-point type of the file.
        facts: What the file states about itself.
        layout: Layout of the file. Default: "original".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = to_layout(network, layout)
    narrowed = {key: narrow(key, value, getattr(torch, dtype)) for key, value in tensors.items()}
    write_safetensors(path, narrowed, {"format": "pt", **facts})


def write_record(path: Path, record: Mapping[str, object], *, figures: Mapping[str, float]) -> None:
    """Write NAME.yaml beside an exported file: its SHA-256, and how it was trained.

    Args:
        path: The file.
        record: The record of the run.
        figures: Figures of its last validation.
    """
    about = {"sha256": sha256(path), "training": to_dict(record), "figures": dict(figures)}
    beside = path.with_suffix(".yaml")
    write_atomically(beside, format_yaml(about, beside.name))
