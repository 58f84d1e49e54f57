"""The weights that adapters have changed, as they were: kept in a file without a name, outside memory."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import IO, NamedTuple

import torch
from torch import Tensor

from ldm.support.home import library_home, make_folder

Key = tuple[str, str]  # network, and name of the tensor in it
WRITTEN = 2**20  # bytes that are written at once; more take longer


class _Entry(NamedTuple):
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Originals:
    """Tensors in a nameless file below LDM_HOME, which ends with the process.

    A copy of a pipeline shares the file: what is written is never changed while it is kept.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0
        self._entries: dict[Key, _Entry] = {}

    def __deepcopy__(self, memo: object) -> Originals:
        other = Originals()
        # entries of a copy are only appended behind those that it shares
        other._file, other._end, other._entries = self._file, self._end, dict(self._entries)
        return other

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, tensors: Mapping[Key, Tensor]) -> None:
        """Keep tensors; if an error is raised, none of them is kept.

        Raises:
            OSError: If they cannot be written.
        """
        if not tensors:
            return
        before = self._end
        try:
            self._reserve(sum(tensor.nbytes for tensor in tensors.values()))
            for key, tensor in tensors.items():
                self._write(key, tensor.detach())
        except BaseException:
            self._end = before
            self.drop(tensors)
            raise

    def _reserve(self, size: int) -> None:
        """Make room for a number of bytes behind the tensors: writing them takes a third less time then."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=make_folder(library_home()), buffering=0)  # noqa: SIM115
            self._end = 0
        if size and sys.platform == "linux":  # elsewhere the file grows when it is written
            os.posix_fallocate(self._file.fileno(), self._end, size)

    def _write(self, key: Key, tensor: Tensor) -> None:
        assert self._file is not None
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        data, offset = flat.numpy().data, self._end
        while data:
            written = os.pwrite(self._file.fileno(), data[:WRITTEN], offset)
            data, offset = data[written:], offset + written
        self._entries[key] = _Entry(self._end, tensor.dtype, tuple(tensor.shape))
        self._end = offset

    def read(self, key: Key) -> Tensor:
        """Return a tensor as it was, on the CPU."""
        entry = self._entries[key]
        assert self._file is not None
        flat = torch.empty(entry.size, dtype=torch.uint8, device="cpu")
        data, offset = flat.numpy().data, entry.offset
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            if not count:
                raise OSError(f"the file of the original weights is truncated at {offset} of {entry.size}")
            data, offset = data[count:], offset + count
        return flat.view(entry.dtype).view(entry.shape)

    def drop(self, keys: Iterable[Key]) -> None:
        """Forget tensors; the file ends when nothing is kept."""
        for key in keys:
            self._entries.pop(key, None)
        if not self._entries:
            self._file = None
