"""Checkpoints that several processes write together, by torch.distributed.checkpoint.

A checkpoint is the folder ``checkpoint-STEP`` of a run: the rows that each process holds, in
``process-RANK.safetensors`` (see `parts`), and ``state.json`` with the rest and the SHA-256 of each file. It
is written beside its place and renamed when it is complete. Any number of processes can read it.
"""

from __future__ import annotations

import json
import re
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

from ldm.support.files import replace_folder, temporary_path, write_atomically
from ldm.support.strict_json import read_json
from ldm.training.distributed.parts import PartReader, PartWriter, described_parts, part_file
from ldm.training.distributed.processes import Processes
from ldm.training.distributed.state import TensorShapes
from ldm.weights.formats.safetensors import sha256

STATE_FILE = "state.json"
KEYS = {"config", "step", "seconds", "files"}  # of the state file
PART = re.compile(r"process-[0-9]{1,6}\.safetensors")
ADVICE = "delete it to train from the beginning, or put back a copy"


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
            dcp.save(tensors, storage_writer=PartWriter(stage, processes.rank))
        except CheckpointException as error:  # of one process or several, raised in all
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(
                f"process {rank} cannot write {str(path)!r} ({cause}): the checkpoint before it is kept"
            ) from None
        hashes = [""] * processes.size
        dist.all_gather_object(hashes, sha256(stage / part_file(processes.rank)))

        def finish() -> None:
            files = {part_file(rank): digest for rank, digest in enumerate(hashes)}
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
        ValueError: If it is damaged, or written by a version that pickled the parts.
    """
    about = read_json(path / STATE_FILE, infinite=True)
    if not about.keys() >= KEYS or not isinstance(about["step"], int) or not isinstance(about["files"], dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: expected {', '.join(sorted(KEYS))}: {ADVICE}")
    if ".metadata" in about["files"]:
        raise ValueError(
            f"{str(path)!r} holds pickles, which an earlier version wrote: end the run with that version by"
            " one process, whose checkpoint is read, or delete it to train from the beginning"
        )
    if not about["files"] or not all(map(PART.fullmatch, about["files"])):
        raise ValueError(f"{str(path)!r} names other files than those of its processes: {ADVICE}")
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
    found = described_parts(path, read_about(path)["files"]).state_dict_metadata
    return {name: (each.size, each.properties.dtype) for name, each in found.items()}  # type: ignore[union-attr]


def read_into(path: Path, places: dict[str, Tensor], processes: Processes) -> None:
    """Read a checkpoint into tensors of its names and shapes, each process the parts that it holds."""
    reader = PartReader(path, read_about(path)["files"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads alone
        dcp.load(places, storage_reader=reader, no_dist=processes.size == 1)
