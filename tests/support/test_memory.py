"""Tensors that are mapped from a file leave memory; what was changed, or is in no file, stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pages import in_memory
from torch import Tensor

from ldm.support import memory
from ldm.support.memory import release_unchanged
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors

pytestmark = pytest.mark.skipif(not memory.PAGEMAP.exists(), reason="the system does not state its pages")
SIDE = 512  # a tensor of 1 MB


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    """Tensors that are mapped from a file, all of whose pages were read."""
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {name: torch.randn(SIDE, SIDE) for name in "ab"})
    mapped = read_safetensors(path)
    assert all(tensor.sum().isfinite() and in_memory(tensor) > 200 for tensor in mapped.values())
    return mapped


def test_mapped_tensors_leave_memory_and_keep_their_values(tensors: dict[str, Tensor]) -> None:
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    release_unchanged(tensors.values())
    assert not any(map(in_memory, tensors.values()))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_one_changed_number_keeps_its_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["a"].data[SIDE // 2, 0] = 7.0  # no version counter of `a` records it
    expected = tensors["a"].clone()
    release_unchanged(tensors.values())
    assert torch.equal(tensors["a"], expected) and in_memory(tensors["a"]) > 200
    assert in_memory(tensors["b"]) == 0


def test_tensors_of_no_file_stay(tensors: dict[str, Tensor]) -> None:
    made, strided = torch.randn(SIDE, SIDE), tensors["a"].T
    shared = torch.randn(SIDE, SIDE).share_memory_()
    expected = made.clone(), shared.clone()
    release_unchanged([made, strided, shared, torch.empty(0), torch.empty(3, device="meta"), made[:1, :1]])
    assert in_memory(made) > 200 and in_memory(strided.T) > 200
    assert torch.equal(made, expected[0]) and torch.equal(shared, expected[1])


def test_without_a_page_map_nothing_leaves(
    tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "PAGEMAP", tmp_path / "none")
    release_unchanged(tensors.values())
    monkeypatch.undo()
    assert in_memory(tensors["a"]) > 200
