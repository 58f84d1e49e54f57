"""Hint makers: white on black, where the image changes, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.images.hints import canny, scribble, soft_edge, tile

EDGES = (canny, soft_edge, scribble)


def square(side: int = 48) -> Tensor:
    image = torch.zeros(1, 3, side, side)
    image[..., side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
    return image


@pytest.mark.parametrize("make", EDGES)
def test_edges_are_white_on_black_along_the_border(make) -> None:
    image = square()
    hint = make(image)
    assert hint.shape == image.shape and hint.dtype == torch.float32
    assert 0 <= float(hint.min()) and float(hint.max()) <= 1 and float(hint.mean()) < 0.4
    far = hint[..., :5, :].max(), hint[..., 20:28, 20:28].max()  # outside and in the middle
    assert max(far) < 0.05
    row = hint[0, 0, 24]
    assert float(row[8:16].max()) > 0.8 and float(row[32:40].max()) > 0.8
    assert not bool(make(torch.full((1, 3, 48, 48), 0.5)).any()), "a flat image has no edges"
    changed = ((make(1 - image) - hint).abs() > 1e-4).float().mean()
    assert changed < 0.1, "but for ties, edges do not depend on the polarity"


def test_canny_edges_are_thin_and_scribbles_thick() -> None:
    row = canny(square())[0, 0, 24]
    assert int(row.sum()) <= 4 and set(row.tolist()) == {0.0, 1.0}
    assert 6 <= int(scribble(square(), width=5)[0, 0, 24].sum()) <= 14


def test_tiles_keep_means_and_lose_details() -> None:
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = tile(image, factor=8)
    assert made.shape == image.shape and float(made.std()) < 0.3 * float(image.std())
    assert torch.allclose(made.mean((2, 3)), image.mean((2, 3)), atol=0.03)
    assert torch.allclose(tile(image, factor=1), image, atol=1e-5)


def test_numbers_out_of_range_are_refused() -> None:
    for call, message in (
        (lambda: canny(square(), low=0.5, high=0.2), "low: expected 0 to 0.2"),
        (lambda: soft_edge(square(), sigma=-1.0), "sigma"),
        (lambda: scribble(square(), width=0), "width"),
        (lambda: tile(square(), factor=0), "factor"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
