"""Damaged checkpoints of several processes: read, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fuzzing import Target, check
from text_mutations import in_folder, mutated_file, place_in_folder

from ldm.training.distributed.checkpoint import STATE_FILE, check_files, read_about, read_into, read_shapes
from ldm.training.distributed.parts import part_file
from ldm.training.distributed.processes import ONE_PROCESS
from ldm.weights.cast import is_finite
from ldm.weights.formats.safetensors import sha256, write_safetensors

ROWS = torch.arange(12.0).reshape(3, 4)
PARTS = (
    {"model.x@0": ROWS[:2], "optimizer.x.step@0": torch.tensor(3.0), "model.empty@0": torch.zeros(0, 2)},
    {"model.x@2": ROWS[2:], "model.half@0": torch.ones(2, dtype=torch.bfloat16)},
)
ABOUT = {"config": {"run": {"steps": 4}}, "step": 3, "seconds": 1.0}


def describe(folder: Path) -> None:
    """Write the state file of a checkpoint, with the hashes of its files."""
    files = {path.name: sha256(path) for path in folder.glob("*.safetensors")}
    (folder / STATE_FILE).unlink(missing_ok=True)
    (folder / STATE_FILE).write_text(json.dumps({**ABOUT, "files": files}), encoding="utf-8")


def place(mutant: bytes, folder: Path) -> Path:
    """Write a checkpoint with one damaged file; the hash of a damaged part is right."""
    made = place_in_folder(mutant, folder)
    if not mutant.partition(b"\n")[0].endswith(STATE_FILE.encode()):
        describe(made)
    return made


def read(path: Path) -> None:
    """Read a checkpoint, and use every tensor."""
    read_about(path)
    check_files(path, ONE_PROCESS)
    places = {
        name: torch.zeros(shape, dtype=dtype, device="cpu")
        for name, (shape, dtype) in read_shapes(path).items()
    }
    read_into(path, places, ONE_PROCESS)
    for tensor in places.values():
        is_finite(tensor)


def test_damaged_checkpoints_of_several_processes(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for rank, tensors in enumerate(PARTS):
        write_safetensors(base / part_file(rank), tensors)
    describe(base)
    names = [part_file(0), part_file(1), part_file(1), STATE_FILE]
    check(
        Target(name="sharded checkpoints", read=read, place=place),
        in_folder(base, names),
        mutated_file,
        tmp_path,
    )
