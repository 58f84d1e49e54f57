"""Writing what a run has trained: half-precision weights, and a YAML that says what they are and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config import to_dict
from ldm.training.checkpoint import write_atomically
from ldm.weights.io import sha256, write_safetensors


def export_part(folder: Path, name: str, module: nn.Module, config: Any, record: Mapping[str, Any], **facts: Any) -> None:
    """Write ``name``.safetensors (float16) and ``name``.yaml: the network's configuration, the facts, the file's hash and the training record."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    state = {key: half(key, value) for key, value in module.state_dict().items()}
    weights = folder / f"{name}.safetensors"
    write_safetensors(weights, state, {"format": "pt", "part": name})
    about = {"model": to_dict(config), **to_dict(facts), "sha256": sha256(weights), "training": to_dict(record)}
    write_atomically(folder / f"{name}.yaml", yaml.safe_dump(about, sort_keys=False, width=140).encode())


def half(key: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor in float16; ValueError if a number leaves float16's range or is not finite."""
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value
    small = value.to(torch.float16)
    if not torch.isfinite(small).all():
        raise ValueError(f"{key}: not all numbers are finite in float16 (largest {float(value.abs().max()):.3g})")
    return small.contiguous()


def read_part(folder: str | Path, name: str) -> dict[str, Any]:
    """The YAML beside exported weights; FileNotFoundError says what to train first, ValueError if the weights are others than it says."""
    from ldm.config import read_yaml

    about, weights = Path(folder) / f"{name}.yaml", Path(folder) / f"{name}.safetensors"
    if not about.is_file() or not weights.is_file():
        raise FileNotFoundError(f"no exported {name} in {str(folder)!r}: train it and export it there first (`python -m ldm train`, `python -m ldm export`)")
    record = read_yaml(about)
    if sha256(weights) != record["sha256"]:
        raise ValueError(f"{str(weights)!r} is not the file that {about.name} was written with: its sha256 differs")
    return record
