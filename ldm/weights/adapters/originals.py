"""The weights that adapters have changed, as they were: kept outside memory.

A weight whose file is mapped is read from there again: one that was converted from the file's tensor is
converted again, and one that is mapped itself stays where it is, and its parameter gets other memory. The
others are written to a file without a name.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import IO, NamedTuple

import torch
from torch import Tensor

from ldm.support.files import errors_name
from ldm.support.home import library_home, make_folder
from ldm.support.memory import in_file, release_unchanged
from ldm.weights.sources import mapped_source

Key = tuple[str, str]  # network, and name of the tensor in it
WRITTEN = 2**20  # bytes that are written at once; more take longer


class _Written(NamedTuple):
    """A tensor in the nameless file."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _Mapped(NamedTuple):
    """A tensor that is mapped from the weights' file.

    `own` says whether it is the parameter's own memory, which is then given back to it.
    """

    tensor: Tensor
    dtype: torch.dtype
    own: bool


class Originals:
    """Tensors in the files of weights, and in a nameless file below LDM_HOME, which ends with the process.

    A copy of a pipeline shares the files: what is written is never changed while it is kept.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0
        self._entries: dict[Key, _Written | _Mapped] = {}

    def __deepcopy__(self, memo: object) -> Originals:
        other = Originals()
        # entries of a copy are only appended behind those that it shares
        other._file, other._end, other._entries = self._file, self._end, dict(self._entries)
        # the memory of a parameter may change when the parameter has it back
        own = {key for key, each in self._entries.items() if isinstance(each, _Mapped) and each.own}
        other._write({key: self.read(key) for key in own})
        return other

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, tensors: Mapping[Key, Tensor]) -> None:
        """Keep tensors; if an error is raised, none of them is kept.

        Raises:
            OSError: If they cannot be written; the message names the folder.
        """
        mapped = set(in_file({key: tensor for key, tensor in tensors.items() if tensor.is_contiguous()}))
        found: dict[Key, _Mapped] = {}
        for key, tensor in tensors.items():
            source = tensor if key in mapped else mapped_source(tensor)
            if source is not None:
                found[key] = _Mapped(source.detach(), tensor.dtype, key in mapped)
        self._write({key: tensor for key, tensor in tensors.items() if key not in found})
        self._entries |= found

    def _write(self, tensors: Mapping[Key, Tensor]) -> None:
        if not tensors:
            return
        before, folder = self._end, library_home()
        try:
            with errors_name(folder, folder):
                self._reserve(sum(tensor.nbytes for tensor in tensors.values()))
                for key, tensor in tensors.items():
                    self._write_one(key, tensor.detach())
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

    def _write_one(self, key: Key, tensor: Tensor) -> None:
        assert self._file is not None
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        data, offset = flat.numpy().data, self._end
        while data:
            written = os.pwrite(self._file.fileno(), data[:WRITTEN], offset)
            data, offset = data[written:], offset + written
        self._entries[key] = _Written(self._end, tensor.dtype, tuple(tensor.shape))
        self._end = offset

    def read(self, key: Key) -> Tensor:
        """Return a tensor as it was, in memory of its own on the CPU."""
        entry = self._entries[key]
        if isinstance(entry, _Mapped):
            found = torch.empty_like(entry.tensor, dtype=entry.dtype).copy_(entry.tensor)
            release_unchanged([entry.tensor])
            return found
        assert self._file is not None
        flat = torch.empty(entry.size, dtype=torch.uint8, device="cpu")
        data, offset = flat.numpy().data, entry.offset
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            if not count:
                raise OSError(f"the file of the original weights is truncated at {offset} of {entry.size}")
            data, offset = data[count:], offset + count
        return flat.view(entry.dtype).view(entry.shape)

    def is_memory_of(self, key: Key, parameter: Tensor) -> bool:
        """Return whether a kept tensor is the memory that a parameter has now, which must not be written."""
        entry = self._entries.get(key)
        return isinstance(entry, _Mapped) and entry.own and _place(entry.tensor) == _place(parameter)

    def restore(self, key: Key, parameter: Tensor) -> None:
        """Give a parameter the values that it had, in its present dtype and on its device."""
        entry = self._entries[key]
        if self.is_memory_of(key, parameter):
            return
        if isinstance(entry, _Mapped):
            like = (parameter.dtype, parameter.device, parameter.shape, parameter.stride())
            kept = entry.tensor
            if entry.own and like == (kept.dtype, kept.device, kept.shape, kept.stride()):
                parameter.data = kept
            else:
                parameter.copy_(kept.to(entry.dtype) if parameter.dtype != entry.dtype else kept)
                release_unchanged([kept])
            return
        parameter.copy_(self.read(key))

    def drop(self, keys: Iterable[Key]) -> None:
        """Forget tensors; the file ends when nothing is kept."""
        for key in keys:
            self._entries.pop(key, None)
        if not any(isinstance(each, _Written) for each in self._entries.values()):
            self._file = None


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()
