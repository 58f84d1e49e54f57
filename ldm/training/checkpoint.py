"""The state of a run in training, as a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from ldm.support.files import write_atomically


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a training state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training state; nothing in the file is executed."""
    return torch.load(path, weights_only=True, map_location="cpu")
