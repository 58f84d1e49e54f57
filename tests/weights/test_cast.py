"""The copy that a change of dtype makes: bitwise what torch makes of it, and no copy where none is needed."""

from __future__ import annotations

import itertools

import pytest
import torch

from ldm.weights import cast as module
from ldm.weights.cast import CHUNK, cast, is_finite

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def every_half() -> torch.Tensor:
    """All 65,536 bit patterns of a 16-bit number: more than one chunk."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOATS, FLOATS)))
def test_bitwise_what_torch_gives(source: torch.dtype, target: torch.dtype) -> None:
    pattern = every_half()
    values = pattern.view(source) if source.itemsize == 2 else pattern.view(torch.float16).to(source)
    tensors = {"all": values.view(256, 256), "transposed": values.view(2, -1).t(), "scalar": values[5].clone(), "empty": values[:0]}
    for name, made in cast(tensors, target).items():
        wanted = tensors[name].to(target)
        finite = ~wanted.isnan()
        assert made.dtype == target
        assert made.shape == wanted.shape
        assert made.is_contiguous()
        assert torch.equal(made.isnan(), wanted.isnan())
        assert torch.equal(made[finite], wanted[finite])
        assert torch.equal(made[finite].signbit(), wanted[finite].signbit())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    tensors = {str(i): torch.randn(CHUNK + 100 * i, generator=generator).to(torch.float16) for i in range(7)}
    for target in (torch.bfloat16, torch.float32, None):
        made = cast(tensors, target)
        assert list(made) == list(tensors)
        assert all(torch.equal(made[name], tensor.to(target or tensor.dtype)) for name, tensor in tensors.items())


def test_what_is_not_finite_is_found_wherever_it_stands() -> None:
    values = torch.zeros(3 * CHUNK, dtype=torch.bfloat16)
    assert is_finite(values) and is_finite(torch.arange(3)) and is_finite(values[:0])
    for place, bad in ((0, float("nan")), (-1, float("inf")), (CHUNK, -float("inf"))):
        assert not is_finite(torch.cat([values[:place], torch.tensor([bad], dtype=torch.bfloat16), values[place:]]))


def test_nothing_is_copied_in_vain() -> None:
    tensors = {"same": torch.ones(3, dtype=torch.bfloat16), "whole": torch.arange(3)}
    made = cast(tensors, torch.bfloat16)
    assert all(made[name].data_ptr() == tensors[name].data_ptr() for name in tensors)
    assert cast({"x": torch.ones(2)}, None)["x"].dtype == torch.float32
