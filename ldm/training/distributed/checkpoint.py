"""Checkpoints that several processes write together, by torch.distributed.checkpoint.

A checkpoint is the folder ``checkpoint-STEP`` of a run: the tensors by name in ``*.distcp`` and
``.metadata``, and ``state.json`` with the rest and the SHA-256 of each file. It is written beside its place
and renamed when it is complete. Any number of processes can read it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ldm.support.files import replace_folder, temporary_path, write_atomically
from ldm.support.strict_json import read_json
from ldm.support.text import shown
from ldm.training.distributed.processes import Processes
from ldm.training.distributed.state import TensorShapes
from ldm.weights.formats.safetensors import sha256

STATE_FILE = "state.json"
KEYS = {"config", "step", "seconds", "files"}  # of the state file
_METADATA = "torch.distributed.checkpoint.metadata"
# what the pickle in .metadata may name: classes that hold names and numbers
PERMITTED_CLASSES = {
    _METADATA: (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
}
ADVICE = "delete it to train from the beginning, or put back a copy"


def _joined(*parts: str) -> str:
    return os.path.join(*parts)


class MetadataUnpickler(pickle.Unpickler):
    """Reads a ``.metadata`` file, and refuses what could execute anything."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that is permitted."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in PERMITTED_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return _joined  # the folder that it was written to, which is not used
        raise pickle.UnpicklingError(f"it names {shown(f'{module}.{name}')}, which is not permitted")


class CheckedReader(dcp.FileSystemReader):
    """Reads tensors from a folder, and executes nothing in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the names, shapes and places of the tensors.

        Raises:
            ValueError: If it holds anything else, or names a file outside the folder.
        """
        folder = Path(self.path)
        try:
            with (folder / ".metadata").open("rb") as file:
                metadata = MetadataUnpickler(file).load()
            kinds = {type(each) for each in metadata.state_dict_metadata.values()}
            stored = list(metadata.storage_data.values())
            plain = all(Path(each.relative_path).name == each.relative_path for each in stored)
            transformed = any(each.transform_descriptors for each in stored)
        except Exception as error:  # a damaged pickle raises errors of many classes
            raise ValueError(f"{str(folder)!r} is damaged ({error}): {ADVICE}") from None
        if kinds != {TensorStorageMetadata} or not plain or transformed:
            raise ValueError(f"{str(folder)!r} holds more than tensors: {ADVICE}")
        metadata.storage_meta = None
        return metadata


def save_together(
    path: Path, tensors: dict[str, Tensor], about: Mapping[str, Any], processes: Processes
) -> None:
    """Write a checkpoint by all processes; the folder appears when it is complete.

    Args:
        path: The folder.
        tensors: The tensors by name; each process gives the parts that it holds.
        about: Further values of the state file: "config", "step" and "seconds".
        processes: The processes.

    Raises:
        OSError: If a file cannot be written, in all processes.
    """

    def prepare() -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = temporary_path(path.parent)
        stage.mkdir()
        return str(stage)

    stage = Path(processes.once(prepare))
    try:
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(stage))
        except CheckpointException as error:  # of one process or several, raised in all
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(
                f"process {rank} cannot write {str(path)!r} ({cause}): the checkpoint before it is kept"
            ) from None
        own = {each.name: sha256(each) for each in sorted(stage.glob(f"__{processes.rank}_*"))}
        hashes: list[dict[str, str]] = [{} for _ in range(processes.size)]
        dist.all_gather_object(hashes, own)

        def finish() -> None:
            files = {name: digest for each in hashes for name, digest in each.items()}
            files[".metadata"] = sha256(stage / ".metadata")
            text = json.dumps({**about, "files": files}, indent=1) + "\n"
            write_atomically(stage / STATE_FILE, text.encode())
            replace_folder(stage, path)

        processes.once(finish)
    finally:
        if processes.first:
            shutil.rmtree(stage, ignore_errors=True)


def read_about(path: Path) -> dict[str, Any]:
    """Return the state file of a checkpoint.

    Raises:
        ValueError: If it is damaged.
    """
    about = read_json(path / STATE_FILE, infinite=True)
    if not about.keys() >= KEYS or not isinstance(about["step"], int) or not isinstance(about["files"], dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: expected {', '.join(sorted(KEYS))}: {ADVICE}")
    return about


def check_files(path: Path, processes: Processes) -> None:
    """Check the hashes of a checkpoint's files, each by one of the processes.

    Raises:
        ValueError: If a file is absent or damaged, in all processes.
    """
    listed = sorted(read_about(path)["files"].items())
    wrong = [
        name
        for name, digest in listed[processes.rank :: processes.size]
        if not (path / name).is_file() or sha256(path / name) != digest
    ]
    if int(processes.total(torch.tensor(len(wrong), device="cpu"))):
        named = f"{wrong[0]!r} differs" if wrong else "a file differs"
        raise ValueError(f"{str(path)!r} is damaged ({named} from its SHA-256): {ADVICE}")


def read_shapes(path: Path) -> TensorShapes:
    """Return shape and dtype of each tensor in a checkpoint."""
    found = CheckedReader(path).read_metadata().state_dict_metadata
    return {name: (each.size, each.properties.dtype) for name, each in found.items()}  # type: ignore[union-attr]


def read_into(path: Path, places: dict[str, Tensor], processes: Processes) -> None:
    """Read a checkpoint into tensors of its names and shapes, each process the parts that it holds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads alone
        dcp.load(places, storage_reader=CheckedReader(path), no_dist=processes.size == 1)
