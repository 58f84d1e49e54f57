"""Safetensors files with the SHA-256 of each tensor in their metadata, by the tensor's name.

Damage is noticed when a tensor is read, and costs no reading of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from ldm.support.text import shown
from ldm.weights.formats.safetensors import write_safetensors


def write_hashed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their hashes to a file, completely or not at all."""
    hashes = {name: sha256_of(value.detach().cpu().contiguous().numpy()) for name, value in tensors.items()}
    write_safetensors(path, tensors, hashes)


def sha256_of(values: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes in 64 hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def compare_hash(values: np.ndarray, expected: str, path: Path, name: str, advice: str) -> None:
    """Raise ValueError for a tensor that is not the one that was written.

    Args:
        values: The tensor.
        expected: Its hash in the file.
        path: The file, for the message.
        name: The tensor's name, for the message.
        advice: What to do, for the message.
    """
    if sha256_of(values) != expected:
        raise ValueError(f"{str(path)!r} is damaged ({shown(name)} differs from its SHA-256): {advice}")
