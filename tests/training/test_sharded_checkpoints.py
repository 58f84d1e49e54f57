"""Checkpoints of several processes: damage is named, they hold no pickle; one error ends a run."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from killing import in_fresh_process
from many_processes import run_together
from tiny_part import TinyPart, tiny_config

from ldm.training.distributed.checkpoint import (
    STATE_FILE,
    check_files,
    read_about,
    read_into,
    read_shapes,
)
from ldm.training.distributed.group import joined_processes
from ldm.training.distributed.parts import PartWriter, part_file
from ldm.training.distributed.processes import ONE_PROCESS
from ldm.training.loop import Run
from ldm.weights.formats.safetensors import sha256, write_safetensors

TENSORS = {"model.x": torch.arange(12.0).reshape(3, 4), "optimizer.x.step": torch.tensor(3.0)}


def written(folder: Path, tensors: dict) -> Path:
    """Write a checkpoint by one process."""
    path = folder / "checkpoint-0000003"
    path.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=PartWriter(path, 0), no_dist=True)
    return described(path)


def in_parts(folder: Path, *parts: dict[str, torch.Tensor]) -> Path:
    """Write a checkpoint of several processes: for each its parts by name."""
    path = folder / "checkpoint-0000003"
    path.mkdir(parents=True)
    for rank, tensors in enumerate(parts):
        write_safetensors(path / part_file(rank), tensors)
    return described(path)


def described(path: Path) -> Path:
    files = {each.name: sha256(each) for each in path.iterdir()}
    about = {"config": {}, "step": 3, "seconds": 1.0, "files": files}
    (path / STATE_FILE).write_text(json.dumps(about), encoding="utf-8")
    return path


def test_tensors_are_read_back(tmp_path):
    path = written(tmp_path, TENSORS)
    check_files(path, ONE_PROCESS)
    shapes = read_shapes(path)
    assert shapes == {name: (value.shape, value.dtype) for name, value in TENSORS.items()}
    places = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    read_into(path, places, ONE_PROCESS)
    assert all(torch.equal(places[name], value) for name, value in TENSORS.items())


@pytest.mark.parametrize("change", ["flipped", "short", "absent"])
def test_a_damaged_file_is_named(tmp_path, change):
    path = written(tmp_path, TENSORS)
    file = path / part_file(0)
    content = file.read_bytes()
    if change == "absent":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if change == "short" else content[:-9] + b"!" + content[-8:])
    with pytest.raises(ValueError, match=r"checkpoint-0000003' is damaged \('process-0.safetensors' differs"):
        check_files(path, ONE_PROCESS)


def test_a_damaged_state_file_is_named(tmp_path):
    path = written(tmp_path, TENSORS)
    (path / STATE_FILE).write_text('{"step": "three"}', encoding="utf-8")
    with pytest.raises(ValueError, match="checkpoint-0000003' is not a checkpoint: expected config, files"):
        read_about(path)


ROWS = torch.arange(12.0).reshape(3, 4)


def test_rows_of_several_processes_are_one_tensor(tmp_path):
    path = in_parts(
        tmp_path,
        {"x@0": ROWS[:2], "step@0": torch.tensor(3.0), "empty@0": torch.zeros(0, 2)},
        {"x@2": ROWS[2:], "a@b@0": torch.ones(2)},
        {"x@3": ROWS[3:]},
    )
    shapes = read_shapes(path)
    assert {name: tuple(shape) for name, (shape, _) in shapes.items()} == {
        **{"x": (3, 4), "step": (), "empty": (0, 2), "a@b": (2,)}
    }
    places = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    read_into(path, places, ONE_PROCESS)
    assert torch.equal(places["x"], ROWS) and float(places["step"]) == 3


@pytest.mark.parametrize(
    "parts",
    [
        [{"x@0": ROWS[:1]}, {"x@2": ROWS[2:]}],  # a gap
        [{"x@0": ROWS[:2]}, {"x@1": ROWS[1:]}],  # twice
        [{"x@1": ROWS}],  # the beginning is absent
        [{"x@0": ROWS[:2]}, {"x@2": ROWS[2:, :3]}],
        [{"x@0": ROWS[:2]}, {"x@2": ROWS[2:].double()}],
        [{"x@0": torch.tensor(1.0)}, {"x@1": torch.tensor(1.0)}],
    ],
)
def test_parts_that_are_not_the_rows_of_a_tensor_are_refused(tmp_path, parts):
    with pytest.raises(ValueError, match="checkpoint-0000003': the parts of 'x' are not the rows of a ten"):
        read_shapes(in_parts(tmp_path, *parts))


@pytest.mark.parametrize("name", ["x", "@0", "x@", "x@-1", "x@1e3", "x@" + "9" * 400, "x@²"])
def test_other_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="process-0.safetensors'.* is not the name of a part, NAME@ROW"):
        read_shapes(in_parts(tmp_path, {name: ROWS}))


def test_only_files_of_processes_are_opened(tmp_path):
    path = in_parts(tmp_path / "run", {"x@0": ROWS})
    write_safetensors(tmp_path / "process-0.safetensors", {"x@0": ROWS})
    about = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    for name in ("../../process-0.safetensors", "/etc/passwd", "process-0.safetensors\n"):
        (path / STATE_FILE).write_text(json.dumps({**about, "files": {name: "0"}}), encoding="utf-8")
        with pytest.raises(ValueError, match="checkpoint-0000003' names other files than those of its proc"):
            check_files(path, ONE_PROCESS)


def test_checkpoints_with_pickles_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "checkpoint-0000003"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(TENSORS), storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    with pytest.raises(ValueError, match="holds pickles, which an earlier version wrote: end the run with"):
        read_about(described(path))


class Failing(TinyPart):
    """A part of which one process fails in step 4: its loss is NaN, or it ends."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.rank, self.how = rank, how

    def loss(self, draws):
        value, figures = super().loss(draws)
        if draws.step != 3 or self.rank != 1:
            return value, figures
        if self.how == "end":
            os._exit(7)
        return value * float("nan"), figures


def train_failing(folder: str, how: str) -> list[int]:
    """Train in two processes of which one fails, and note the errors."""

    def action() -> None:
        config = tiny_config(steps=9, checkpoint_every=2)
        rank = int(os.environ["RANK"])
        try:
            with joined_processes("cpu") as processes:
                part = Failing(rank, how)
                Run(part, config.run, config, Path(folder), torch.device("cpu"), processes).train(
                    progress=False
                )
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            Path(folder, f"error-{rank}.txt").write_text(text, encoding="utf-8")

    return run_together(2, action)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("nan", "FloatingPointError: step 4: the loss is nan"),
        ("end", "ConnectionError: process 0 of 2 has lost"),
    ],
)
def test_a_failure_of_one_process_is_one_error(tmp_path, how, error):
    in_fresh_process(Path(__file__), "train_failing", str(tmp_path), how)
    texts = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("error-*.txt"))]
    lines = [text for text in texts if text != "SystemExit: 2"]
    assert len(lines) == 1 and lines[0].startswith(error), texts
    (path,) = tmp_path.glob("checkpoint-*")
    check_files(path, ONE_PROCESS)  # the last checkpoint is whole
    assert read_about(path)["step"] == 2
