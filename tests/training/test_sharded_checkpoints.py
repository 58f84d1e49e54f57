"""Checkpoints of several processes: damage is named, nothing in them is executed; one error ends a run."""

from __future__ import annotations

import json
import os
import pickle
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
from ldm.training.distributed.processes import ONE_PROCESS
from ldm.training.loop import Run
from ldm.weights.formats.safetensors import sha256

TENSORS = {"model.x": torch.arange(12.0).reshape(3, 4), "optimizer.x.step": torch.tensor(3.0)}


def written(folder: Path, tensors: dict) -> Path:
    """Write a checkpoint by one process."""
    path = folder / "checkpoint-0000003"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path), no_dist=True)
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
    (file,) = path.glob("*.distcp")
    content = file.read_bytes()
    if change == "absent":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if change == "short" else content[:-9] + b"!" + content[-8:])
    with pytest.raises(ValueError, match=r"checkpoint-0000003' is damaged \('__0_0.distcp' differs"):
        check_files(path, ONE_PROCESS)


def test_a_damaged_state_file_is_named(tmp_path):
    path = written(tmp_path, TENSORS)
    (path / STATE_FILE).write_text('{"step": "three"}', encoding="utf-8")
    with pytest.raises(ValueError, match="checkpoint-0000003' is not a checkpoint: expected config, files"):
        read_about(path)


class Hostile:
    """An object whose unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_metadata_that_name_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, TENSORS)
    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"is damaged \(it names '(posix|nt|os)\.mkdir', which is not perm"):
        read_shapes(path)
    assert not Path("made-by-a-pickle").exists()


def test_metadata_of_pickled_objects_and_of_other_folders_are_refused(tmp_path):
    path = written(tmp_path, {**TENSORS, "other": {"a": "pickled object"}})
    with pytest.raises(ValueError, match="BytesStorageMetadata', which is not permitted"):
        read_shapes(path)
    path = written(tmp_path / "second", TENSORS)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for entry in metadata.storage_data.values():
        entry.relative_path = "../" + entry.relative_path
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_shapes(path)


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
