"""Conversion of dtypes: bit-identical to torch's, and without a copy if none is needed."""

from __future__ import annotations

import itertools

import pytest
import torch

from ldm.speed.kernels.build import NoKernels, library
from ldm.weights.cast import CHUNK, cast, is_finite

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(params=("compiled", "by PyTorch"))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the compiled kernel, also for few elements, and without it."""
    monkeypatch.setattr("ldm.weights.cast.MANY", 1)

    def missing() -> None:
        raise NoKernels("not wanted here")

    if request.param == "by PyTorch":
        monkeypatch.setattr("ldm.weights.cast.library", missing)
    else:
        try:
            library()
        except NoKernels as error:
            pytest.skip(str(error))


def same(made: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Return whether tensors are bit-identical except for the payload of NaN."""
    finite = ~wanted.isnan()
    signs = torch.equal(made[finite].signbit(), wanted[finite].signbit())
    return torch.equal(made.isnan(), wanted.isnan()) and torch.equal(made[finite], wanted[finite]) and signs


def every_half() -> torch.Tensor:
    """Return all 65,536 bit patterns of a 16-bit number, in more than one chunk."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOATS, FLOATS)))
def test_bitwise_what_torch_gives(source: torch.dtype, target: torch.dtype) -> None:
    pattern = every_half()
    values = pattern.view(source) if source.itemsize == 2 else pattern.view(torch.float16).to(source)
    tensors = {
        "all": values.view(256, 256),
        "transposed": values.view(2, -1).t(),
        "scalar": values[5].clone(),
        "empty": values[:0],
    }
    ready, bad = cast(tensors, target)
    assert bad == [name for name in tensors if not is_finite(tensors[name].to(target))]
    for name, made in ready.items():
        wanted = tensors[name].to(target)
        assert made.dtype == target
        assert made.shape == wanted.shape
        assert made.is_contiguous()
        assert same(made, wanted)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_every_kind_of_float32_is_rounded_as_torch_does(target: torch.dtype) -> None:
    """All upper halves of the bit pattern with some lower halves: also subnormals, ties and overflow."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int64)[:, None]
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    values = (upper * 2**16 + lower).to(torch.int32).view(torch.float32).flatten()
    finite = values[values.to(target).isfinite()]
    ready, bad = cast({"all": values, "finite": finite}, target)
    assert (
        same(ready["all"], values.to(target)) and same(ready["finite"], finite.to(target)) and bad == ["all"]
    )


@pytest.mark.usefixtures("way")
def test_chunks_change_nothing_and_hide_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(i): torch.randn(CHUNK + 100 * i, generator=generator).to(torch.float16) for i in range(4)}
    for target in (torch.bfloat16, torch.float32, None):
        made, bad = cast(tensors, target)
        assert list(made) == list(tensors) and not bad
        assert all(
            torch.equal(made[name], tensor.to(target or tensor.dtype)) for name, tensor in tensors.items()
        )
    for place, value in ((0, float("nan")), (CHUNK - 1, float("inf")), (CHUNK + 50, -float("inf"))):
        for source, target in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
            wrong = tensors["1"].to(source, copy=True)
            wrong[place] = value
            assert cast({"sound": tensors["2"].to(source), "wrong": wrong}, target)[1] == ["wrong"]
    largest = torch.full((2 * CHUNK,), 65504.0, dtype=torch.float16)  # their sum overflows float16
    assert cast({"largest": largest}, torch.bfloat16)[1] == []
    beyond = torch.full((3,), 1e6, dtype=torch.bfloat16)
    assert cast({"beyond": beyond}, torch.float16)[1] == ["beyond"] and is_finite(beyond)


def test_what_is_not_finite_is_found_wherever_it_stands() -> None:
    values = torch.zeros(3 * CHUNK, dtype=torch.bfloat16)
    assert is_finite(values) and is_finite(torch.arange(3)) and is_finite(values[:0])
    for place, bad in ((0, float("nan")), (-1, float("inf")), (CHUNK, -float("inf"))):
        assert not is_finite(
            torch.cat([values[:place], torch.tensor([bad], dtype=torch.bfloat16), values[place:]])
        )


def test_nothing_is_copied_in_vain() -> None:
    tensors = {"same": torch.ones(3, dtype=torch.bfloat16), "whole": torch.arange(3)}
    made, _ = cast(tensors, torch.bfloat16)
    assert all(made[name].data_ptr() == tensors[name].data_ptr() for name in tensors)
    assert cast({"x": torch.ones(2)}, None)[0]["x"].dtype == torch.float32


def test_complex_numbers_are_finite_if_both_parts_are() -> None:
    good = torch.ones(3, dtype=torch.complex64)
    assert is_finite(good) and is_finite(good.conj())
    for bad in (complex(0, float("nan")), complex(float("inf"), 0)):
        assert not is_finite(torch.tensor([1, bad]))
