"""Cached outputs of frozen networks: computed once, and again if their file is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.data import Composition
from ldm.training.caches.compositions import cached_rows

ROWS = [Composition(image=i, background=None) for i in range(70)]


def squares(part: list[Composition]) -> Tensor:
    return torch.tensor([[float(c.image), float(c.image) ** 2] for c in part])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    "truncated": lambda data: data[:-100],
    "without its hash, as earlier versions wrote it": lambda data: data[:-32],
    "empty": lambda data: b"",
}


def test_outputs_are_computed_once(tmp_path: Path) -> None:
    path, sizes = tmp_path / "caches" / "a.npy", []

    def compute(part: list[Composition]) -> Tensor:
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
