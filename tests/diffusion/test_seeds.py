"""Seeds: one for each sample, checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.diffusion.seeds import check_seeds


@pytest.mark.parametrize(
    ("seed", "n", "expected"),
    [
        (3, 2, (3, 4)),
        (np.int64(3), 2, (3, 4)),
        (torch.tensor(3), 1, (3,)),
        ([5, np.int32(1)], 2, (5, 1)),
        (np.array([4, 5]), 2, (4, 5)),
        (2**63 - 2, 2, (2**63 - 2, 2**63 - 1)),
    ],
)
def test_seeds_of_all_kinds(seed, n, expected):
    found = check_seeds(seed, n)
    assert found == expected and all(type(each) is int for each in found)


def test_none_draws_seeds():
    first, second = check_seeds(None, 3), check_seeds(None, 3)
    assert first[1:] == (first[0] + 1, first[0] + 2) and first != second


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ([2.7, 1], "whole numbers from 0 to .*, got 2.7"),
        (2.5, "got 2.5"),
        (True, "got True"),
        ("ab", "got 'ab'"),
        ([1], "1 seeds for 2 images"),
        (-1, "got -1"),
        ([1, -2], "got -2"),
        (2**63, "got 9223372036854775808"),
    ],
)
def test_wrong_seeds_are_errors(seed, message):
    with pytest.raises(ValueError, match=f"seed: .*{message}|{message}"):
        check_seeds(seed, 2)
