"""Cached outputs of frozen networks: computed once, and again if their file is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.data import Facts, Placement, Scene, Thing
from ldm.training.caches.rows import cached_rows

ROWS = [
    Scene(
        facts=Facts(things=(Thing(name="ring"),)),
        placements=(Placement(thing=0, row=i, x=0.5, y=0.5, side=1.0),),
    )
    for i in range(70)
]


def squares(part: list[Scene]) -> Tensor:
    return torch.tensor([[float(c.rows()[0]), float(c.rows()[0]) ** 2] for c in part])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    "truncated": lambda data: data[:-100],
    "without its hash, as earlier versions wrote it": lambda data: data[:-32],
    "empty": lambda data: b"",
}


def test_outputs_are_computed_once(tmp_path: Path) -> None:
    path, sizes = tmp_path / "caches" / "a.npy", []

    def compute(part: list[Scene]) -> Tensor:
        sizes.append(len(part))
        return squares(part)

    for _ in range(2):
        found = cached_rows(path, ROWS, (2,), compute)
        assert sizes == [32, 32, 6] and found.dtype == np.float16
        assert torch.equal(torch.tensor(np.array(found)), squares(ROWS).half())
    assert [each.name for each in path.parent.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_outputs_are_computed_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.npy"
    cached_rows(path, ROWS, (2,), squares)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert torch.equal(torch.tensor(np.array(cached_rows(path, ROWS, (2,), squares))), squares(ROWS).half())
    assert path.read_bytes() == whole
