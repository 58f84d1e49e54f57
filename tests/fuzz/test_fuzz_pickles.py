"""Damaged and hostile pickles in every container: read, or refused with a reason; nothing is executed."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from fuzzing import Target, check
from mutations import mixed, mutated_bytes
from pickle_mutations import mutated_archive, mutated_directory, mutated_legacy, mutated_plain
from torch import nn

from ldm.registry.inspection import inspect
from ldm.weights.cast import is_finite
from ldm.weights.formats.pickles import read_ckpt


def content() -> dict[str, object]:
    base = torch.arange(24.0).view(4, 6)
    return {
        "state_dict": OrderedDict(
            base=base,
            view=base[1:, ::2],
            half=torch.ones(3, dtype=torch.float16),
            tiny=torch.ones(4).to(torch.float8_e4m3fn),
            empty=torch.zeros(0, 2),
            parameter=nn.Parameter(torch.ones(2, 2)),
        ),
        "global_step": 875000,
        "epoch": 3,
        "hyper": [1.5, None, True, ("a", b"b"), {1: 2}, {3}],
        "shape": torch.Size([1, 2]),
    }


def saved(*, legacy: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content(), stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps([1, name])
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def read(path: Path) -> None:
    """Inspect a file; then read it, and use every tensor."""
    report = inspect(path, nan=True, digest=False)
    assert all(line.isprintable() for line in report.text().split("\n"))
    tensors = read_ckpt(path).tensors
    assert not report.unsafe and report.judged  # what is read was judged
    for tensor in tensors.values():
        is_finite(tensor)


def look(path: Path) -> None:
    """Inspect a file that cannot be loaded."""
    report = inspect(path, digest=False)
    assert report.problems
    assert all(line.isprintable() for line in report.text().split("\n"))


CONTAINERS = {
    "zip": (
        read,
        [saved(legacy=False)],
        mixed(mutated_archive, mutated_archive, mutated_directory, mutated_bytes),
    ),
    "legacy": (read, [saved(legacy=True)], mixed(mutated_legacy, mutated_legacy, mutated_bytes)),
    "plain": (
        look,
        [pickle.dumps(content()["hyper"], protocol) for protocol in (2, 3, 4, 5)],
        mixed(mutated_plain, mutated_bytes),
    ),
    "tar": (look, [tarred()], mutated_bytes),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_damaged_pickles(container: str, tmp_path: Path) -> None:
    function, seeds, mutate = CONTAINERS[container]
    check(Target(name=f"{container} pickles", read=function), seeds, mutate, tmp_path)
