"""Damaged safetensors files: read, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from fuzzing import Target, check
from mutations import mixed, mutated_bytes, mutated_header

from ldm.weights.cast import is_finite
from ldm.weights.formats.safetensors import read_safetensors


def read(path: Path) -> None:
    """Read a file, and use every tensor."""
    for tensor in read_safetensors(path).values():
        is_finite(tensor)


def seeds() -> list[bytes]:
    tensors = {
        "unet.weight": torch.arange(12.0).view(3, 4),
        "unet.bias": torch.arange(5, dtype=torch.uint8),
        "vae.scale": torch.tensor(0.18, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2, 2, 2, dtype=torch.float16),
    }
    return [safetensors.torch.save(tensors, {"format": "pt"}), safetensors.torch.save({"a": torch.ones(3)})]


def test_damaged_safetensors(tmp_path: Path) -> None:
    check(Target(name="safetensors", read=read), seeds(), mixed(mutated_header, mutated_bytes), tmp_path)
