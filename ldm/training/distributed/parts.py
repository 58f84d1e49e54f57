"""The files of a checkpoint of several processes: the rows of each tensor that a process holds.

``process-RANK.safetensors`` holds them by the names ``NAME@ROW``, ROW being the first of the rows; that of a
scalar is 0. The headers of these files describe the whole tensors, so that no other file does.
`PartWriter` and `PartReader` let torch.distributed.checkpoint plan who writes and reads what.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ldm.support.text import shown
from ldm.weights.formats.safetensors import TensorInfo, map_safetensors, read_header, write_safetensors


def part_file(rank: int) -> str:
    """Return the name of the file of a process."""
    return f"process-{rank}.safetensors"


class _Part(NamedTuple):
    """Some rows of a tensor: the first of them, and where they are."""

    row: int
    info: TensorInfo
    place: tuple[str, str]  # the file, and the name in it

    @property
    def end(self) -> int:
        """The row behind the last."""
        return self.row + (self.info.shape or (1,))[0]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Offset in the tensor, and size."""
        size = self.info.shape
        return ChunkStorageMetadata(
            torch.Size((self.row, *(0 for _ in size[1:])) if size else ()), torch.Size(size)
        )


class _OnePlace:
    """What readers and writers need not do: a checkpoint has one place, and its plan stays as it is."""

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class PartWriter(_OnePlace, StorageWriter):
    """Writes the parts of a process to its file.

    Args:
        folder: The folder of the checkpoint.
        rank: The number of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what a plan lists; TypeError for what is no tensor, ValueError for parts that are no rows."""
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            offset, value = item.index.offset or (), planner.resolve_data(item)
            if any(offset[1:]):
                raise ValueError(f"{item.index.fqn!r} begins at {tuple(offset)}, expected rows of the tensor")
            tensors[f"{item.index.fqn}@{next(iter(offset), 0)}"] = value  # type: ignore[assignment]
        write_safetensors(self.folder / part_file(self.rank), tensors)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(item.index, 0, None) for item in plan.items])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the headers of the files are the metadata."""


class PartReader(_OnePlace, StorageReader):
    """Reads parts from the files of a checkpoint.

    Args:
        folder: The folder of the checkpoint.
        files: Names of its files.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder, self.files = folder, tuple(files)
        self._maps: dict[str, dict[str, Tensor]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the names, shapes and places of the tensors."""
        return described_parts(self.folder, self.files)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Take the places of the parts."""
        self._places: dict[MetadataIndex, tuple[str, str]] = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan lists."""
        for item in plan.items:
            file, name = self._places[item.storage_index]
            if file not in self._maps:
                self._maps[file] = map_safetensors(self.folder / file)[0]
            part = self._maps[file][name]
            for dimension, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dimension, begin, length)
            target = planner.resolve_tensor(item)
            target.detach().copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def described_parts(folder: Path, files: Iterable[str]) -> Metadata:
    """Return the names, shapes and places of the tensors of a checkpoint.

    Args:
        folder: The folder of the checkpoint.
        files: Names of its files.

    Raises:
        ValueError: If a file is damaged, or the parts of a tensor are not its rows from the first to the
            last.
    """
    parts: defaultdict[str, list[_Part]] = defaultdict(list)
    for name, part in _listed(folder, files):
        parts[name].append(part)
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, tuple[str, str]] = {}
    for name, found in parts.items():
        found.sort(key=lambda part: (part.row, part.end))
        if not _are_rows(found):
            raise ValueError(f"{str(folder)!r}: the parts of {shown(name)} are not the rows of a tensor")
        *_, last = found
        tensors[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=last.info.dtype),
            size=torch.Size((last.end, *last.info.shape[1:]) if last.info.shape else ()),
            chunks=[part.chunk for part in found],
        )
        places |= {MetadataIndex(name, part.chunk.offsets): part.place for part in found}
    return Metadata(state_dict_metadata=tensors, storage_data=places)


def _listed(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, _Part]]:
    """Yield the parts in the files of a checkpoint with the names of their tensors."""
    for file in files:
        for key, info in read_header(folder / file)[0].items():
            name, _, row = key.rpartition("@")
            if not name or not (row.isascii() and row.isdecimal() and len(row) <= 15):
                raise ValueError(f"{str(folder / file)!r}: {shown(key)} is not the name of a part, NAME@ROW")
            yield name, _Part(int(row), info, (file, key))


def _are_rows(parts: list[_Part]) -> bool:
    """Return whether sorted parts are the rows of a tensor from the first to the last, each once."""
    begins = [0, *(part.end for part in parts[:-1])]
    kinds = {(part.info.dtype, len(part.info.shape), part.info.shape[1:]) for part in parts}
    alone = len(parts) == 1 or bool(parts[0].info.shape)  # a scalar has one part
    return len(kinds) == 1 and alone and [part.row for part in parts] == begins
