"""The copy that a change of dtype makes: bitwise what torch makes of it, and no copy where none is needed."""

from __future__ import annotations

import itertools

import pytest
import torch

from ldm.weights.cast import cast

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


def test_nothing_is_copied_in_vain() -> None:
    tensors = {"same": torch.ones(3, dtype=torch.bfloat16), "whole": torch.arange(3)}
    made = cast(tensors, torch.bfloat16)
    assert all(made[name].data_ptr() == tensors[name].data_ptr() for name in tensors)
    assert cast({"x": torch.ones(2)}, None)["x"].dtype == torch.float32
