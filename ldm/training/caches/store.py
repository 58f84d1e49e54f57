"""Tensors by key, in safetensors files of a folder that several processes may fill.

Each file appears when it is complete, and has a name of its own, so that a process that is killed loses what
it has not written yet and nothing else. A file is never changed. Each tensor is compared with its hash when
it is read.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.support.warn import warn_user
from ldm.training.caches.hashed import compare_hash, write_hashed
from ldm.weights.formats.safetensors import read_header

NOTHING = torch.empty(0, dtype=torch.float16, device="cpu")  # marks what could not be computed
WRITE_SECONDS = 60.0  # of work after which a file is written
SUFFIX = ".safetensors"


class _Place(NamedTuple):
    path: Path
    begin: int
    shape: tuple[int, ...]
    sha256: str


class TensorStore:
    """Tensors of float16 by key.

    Args:
        folder: The folder; it is created by the first `write`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        self._known: dict[Path, int] = {}  # inodes, as a file that is refused may be replaced
        self.refresh()

    def refresh(self) -> None:
        """Find what other processes have written since."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if self._known.get(path) == (inode := path.stat().st_ino):
                continue
            self._known[path] = inode
            try:
                header, hashes = read_header(path)
            except (ValueError, OSError) as error:
                warn_user(f"{error}; its content is computed again")
                continue
            if not header.keys() <= hashes.keys():
                warn_user(f"{str(path)!r} has no hashes of its tensors, which are computed again: delete it")
                continue
            for key, info in header.items():
                if info.dtype == torch.float16:
                    self._places[key] = _Place(path, info.begin, info.shape, hashes[key])

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> np.ndarray:
        """Return a tensor, float16.

        Raises:
            KeyError: If it is absent.
            ValueError: If it is not the tensor that was written; the message names the file.
        """
        path, begin, shape, sha256 = self._places[key]
        values = np.fromfile(path, np.float16, math.prod(shape), offset=begin)
        compare_hash(values, sha256, path, key, "delete it, and it is computed again")
        return values.reshape(shape)

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
        write_hashed(self.folder / f"{name}{SUFFIX}", small)
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
