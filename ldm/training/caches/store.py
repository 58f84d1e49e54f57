"""Tensors by key, in safetensors files of a folder that several processes may fill.

Each file appears when it is complete, and has a name of its own, so that a process that is killed loses what
it has not written yet and nothing else. A file is never changed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.support.warn import warn_user
from ldm.weights.formats.safetensors import read_header, write_safetensors

NOTHING = torch.empty(0, dtype=torch.float16, device="cpu")  # marks what could not be computed
WRITE_SECONDS = 60.0  # of work after which a file is written
SUFFIX = ".safetensors"


class _Place(NamedTuple):
    path: Path
    begin: int
    shape: tuple[int, ...]


class TensorStore:
    """Tensors of float16 by key.

    Args:
        folder: The folder; it is created by the first `write`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        self._known: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Find what other processes have written since."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path in self._known:
                continue
            self._known.add(path)
            try:
                header, _ = read_header(path)
            except (ValueError, OSError) as error:
                warn_user(f"{error}; its content is computed again")
                continue
            for key, info in header.items():
                if info.dtype == torch.float16:
                    self._places[key] = _Place(path, info.begin, info.shape)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> np.ndarray:
        """Return a tensor, float16; KeyError if it is absent."""
        path, begin, shape = self._places[key]
        count = int(np.prod(shape))
        return np.fromfile(path, np.float16, count, offset=begin).reshape(shape)

    def has_content(self, key: str) -> bool:
        """Return whether there is a tensor that is no mark; see `NOTHING`."""
        return key in self._places and self._places[key].shape != NOTHING.shape

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to a new file, as float16; its name is a hash of their keys."""
        if not tensors:
            return
        name = hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        small = {
            key: tensor.detach().to("cpu", torch.float16).contiguous() for key, tensor in tensors.items()
        }
        write_safetensors(self.folder / f"{name}{SUFFIX}", small)
        self.refresh()


def fill(store: TensorStore, parts: Iterable[Mapping[str, Tensor]]) -> None:
    """Write computed tensors to a store, a file for each minute of work and one for what is left.

    What is computed is written too if computing ends with an error or is interrupted.

    Args:
        store: The store.
        parts: Tensors by key, as they are computed.
    """
    pending: dict[str, Tensor] = {}
    started = time.monotonic()
    try:
        for tensors in parts:
            pending |= {key: tensor.half().cpu() for key, tensor in tensors.items()}
            if time.monotonic() - started >= WRITE_SECONDS:
                store.write(pending)
                pending, started = {}, time.monotonic()
    finally:
        store.write(pending)
