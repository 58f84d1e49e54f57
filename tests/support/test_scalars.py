"""Numbers of numpy and torch become Python numbers, or clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.support.scalars import finite_number, python_scalar, python_scalars, whole_number


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array(7), 7),
        (torch.tensor(2), 2),
        (torch.tensor(0.25), 0.25),
        ("text", "text"),
        (None, None),
    ],
)
def test_scalars_become_python_numbers(value, expected):
    found = python_scalar(value)
    assert found == expected and type(found) is type(expected)


def test_arrays_and_sequences_stay_as_they_are():
    array, values = np.arange(3), [np.int64(1)]
    assert python_scalar(array) is array and python_scalar(values) is values
    assert python_scalars({"a": np.float64(2.0), "b": array}) == {"a": 2.0, "b": array}


@pytest.mark.parametrize("value", [2.5, True, "3", None, 0])
def test_a_whole_number_is_whole(value):
    with pytest.raises(ValueError, match=r"height: expected a whole number of at least 1, got"):
        whole_number("height", value, least=1)
    assert whole_number("height", np.int32(8), least=1) == 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "3", None])
def test_a_finite_number_is_finite(value):
    with pytest.raises(ValueError, match="guidance: expected a finite number, got"):
        finite_number("guidance", value)
    assert finite_number("guidance", torch.tensor(3)) == 3.0
