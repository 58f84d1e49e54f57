"""Canvases: known pixels are preserved, holes filled from their border, corrections solve their equation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.images.canvas import (
    Canvas,
    Padded,
    border_correction,
    border_limit,
    feather_weights,
    fill_hole,
    paste,
)


def random_image(h: int = 12, w: int = 10, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(seed))


def right_half(h: int = 12, w: int = 10) -> Tensor:
    mask = torch.zeros(1, 1, h, w)
    mask[..., w // 2 :] = 1
    return mask


@pytest.mark.parametrize(("seam", "feather"), [(0.0, 0), (4.0, 0), (0.0, 3), (5.0, 2)])
def test_known_pixels_are_bit_identical(seam: float, feather: int) -> None:
    given, made, hole = random_image(), random_image(seed=1), right_half()
    got = paste(made, given, hole, seam=seam, feather=feather)
    assert torch.equal(got[..., :5], given[..., :5]) and not torch.equal(got[..., 5:], given[..., 5:])
    assert 0 <= got.min() and got.max() <= 1
    if feather == 0 and seam == 0:
        assert torch.equal(got[..., 5:], made[..., 5:])


def test_feathered_weights_rise_inside_the_hole_only() -> None:
    weight = feather_weights(right_half(), 3)[0, 0, 4]
    assert torch.allclose(weight, torch.tensor([0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]))
    assert torch.equal(
        feather_weights(torch.ones(1, 1, 4, 4), 2), torch.ones(1, 1, 4, 4)
    )  # the edge of the canvas is not a border


def test_a_constant_difference_fades_as_the_screened_equation_says() -> None:
    difference, hole, reach = torch.full((1, 1, 3, 60), 0.3), torch.zeros(1, 1, 3, 60), 4.0
    hole[..., 1:] = 1
    got = border_correction(torch.zeros_like(difference), difference, hole, reach)[0, 0]
    # c(x+1) − 2c(x) + c(x−1) = c(x)/reach² has c = 0.3·q^x with q + 1/q = 2 + 1/reach²
    k = 2 + reach**-2
    q = (k - math.sqrt(k * k - 4)) / 2
    assert torch.allclose(got[:, 1:40], (0.3 * q ** torch.arange(1.0, 40)).expand(3, -1), atol=1e-4)
    assert bool((got[:, 0] == 0).all())  # nothing outside the hole


def test_without_a_screen_a_linear_difference_between_two_borders_is_continued() -> None:
    ramp = torch.linspace(-1, 1, 21).expand(1, 2, 5, 21)
    hole = torch.zeros(1, 1, 5, 21)
    hole[..., 3:17] = 1
    assert torch.allclose(
        border_correction(torch.zeros_like(ramp), ramp * (1 - hole), hole, 1e6) + ramp * (1 - hole),
        ramp,
        atol=1e-3,
    )


def test_the_step_across_the_border_becomes_the_generated_one() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 3, 40), torch.linspace(0, 3, 40), indexing="ij")
    given, hole = (0.5 + 0.3 * torch.sin(y + 2 * x)).expand(1, 3, 40, 40), right_half(40, 40)
    made = given * 0.6 + 0.1  # an offset and less contrast, as an autoencoder may leave
    got = paste(made, given, hole, seam=10.0)
    wanted = made[..., 20] - made[..., 19]
    plain = paste(made, given, hole)
    error, before = ((x[..., 20] - x[..., 19] - wanted).abs().mean() for x in (got, plain))
    assert error < 0.2 * before  # what remains is the fading within one pixel of ten


@pytest.mark.parametrize("across", [False, True])
def test_a_step_across_the_border_is_limited_to_those_of_the_given_image(across: bool) -> None:
    """The steps of the given image are 0.01 along the axis; the generated one is 0.4 on half the border."""
    given = 0.2 + 0.01 * torch.arange(40.0).expand(1, 3, 40, 40)
    hole, made = right_half(40, 40), given.clone()
    made[:, :, :20, 20:] += 0.4
    if across:
        given, hole, made = (x.transpose(-1, -2) for x in (given, hole, made))
    steps = {}
    for name, got in {
        "plain": paste(made, given, hole),
        "corrected": paste(made, given, hole, seam=10.0),
    }.items():
        got = got.transpose(-1, -2) if across else got
        steps[name] = (got[..., 20] - got[..., 19])[0, 0]
    assert (steps["plain"][:20] - 0.41).abs().max() < 1e-5
    assert (
        steps["corrected"].abs().mean() < 0.06
    )  # the fading of 0.41 within one pixel of ten, 0.04, and the step of 0.01
    assert (steps["corrected"][30:] - 0.01).abs().max() < 0.01  # far from it the border is unchanged


def test_what_is_generated_on_a_flat_image_keeps_its_edges() -> None:
    """A gray object starts at the border of the hole in a white image, which has no steps to compare with."""
    given, hole = torch.ones(1, 3, 40, 40), right_half(40, 40)
    made = given.clone()
    made[..., 20:] = 0.2
    assert (paste(made, given, hole, seam=10.0) - made).abs().max() < 1e-5
    # one pixel high: no vertical neighbors
    alone = paste(torch.rand(1, 3, 1, 10), torch.rand(1, 3, 1, 10), right_half(1, 10), seam=4.0)
    assert alone.isfinite().all()


def test_without_two_known_neighbors_no_step_is_too_large() -> None:
    hole = torch.ones(1, 1, 8, 8)
    hole[..., ::2, ::2] = 0  # no two known pixels are neighbors
    assert (
        border_limit(random_image(h=8, w=8), hole, -1).isinf().all()
        and border_limit(random_image(h=8, w=8), hole, -2).isinf().all()
    )


def test_a_hole_is_filled_from_its_border_only() -> None:
    image, hole = random_image(), right_half()
    other = image.clone()
    other[..., 5:] = 0.123
    assert torch.equal(fill_hole(image, hole), fill_hole(other, hole)) and torch.equal(
        fill_hole(image, hole)[..., :5], image[..., :5]
    )
    flat = torch.full((2, 4, 9, 7), 0.7)
    island = torch.ones(1, 1, 9, 7)
    island[..., 4, 3] = 0
    assert torch.allclose(fill_hole(flat, island), flat, atol=1e-6)
    assert torch.equal(fill_hole(flat, torch.ones(1, 1, 9, 7)), torch.full_like(flat, 0.5))


def test_margins_and_sizes() -> None:
    image = random_image()
    canvas = Canvas.extended(image, left=3, top=2, right=1, bottom=0, multiple=8)
    assert canvas.size == (16, 16) and canvas.frame == (14, 14)
    assert (
        torch.equal(canvas.pixels[..., 2:14, 3:13], image) and float(canvas.hole.sum()) == 16 * 16 - 12 * 10
    )
    assert bool((canvas.hole[..., 2:14, 3:13] == 0).all())
    done = canvas.finish(torch.rand(2, 3, 16, 16), seam=2.0)
    assert done.shape == (2, 3, 14, 14) and torch.equal(done[:, :, 2:, 3:13], image.expand(2, -1, -1, -1))
    with pytest.warns(Padded, match="10×12 is not a multiple of 8: padded to 16×16"):
        canvas = Canvas.masked(image, right_half(), multiple=8)
    assert canvas.size == (16, 16) and canvas.frame == (12, 10)
    assert bool((canvas.hole[..., 10:] == 1).all()) and torch.equal(
        canvas.pixels[..., :12, 15], image[..., 9]
    )  # the last column is repeated


def test_a_latent_position_is_repainted_if_any_of_its_pixels_is() -> None:
    hole = torch.zeros(1, 1, 8, 8)
    hole[..., 3, 5] = 1
    small = Canvas(pixels=torch.zeros(1, 3, 8, 8), hole=hole, frame=(8, 8)).small((2, 2))
    assert torch.equal(small[0, 0], torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Canvas.masked(random_image(), torch.zeros(12, 10)), "black everywhere"),
        (lambda: Canvas.masked(random_image(), torch.ones(12, 9)), "image's size 12×10, got 12×9"),
        (lambda: Canvas.masked(random_image(), torch.zeros(12, 10), multiple=8), "black everywhere"),
        (lambda: Canvas.masked(random_image(), torch.full((12, 10), 3.0)), r"expected \[0, 1\]"),
        (
            lambda: Canvas.masked(random_image().repeat(2, 1, 1, 1), torch.ones(3, 1, 12, 10)),
            "3 masks for 2 images",
        ),
        (
            lambda: Canvas.extended(random_image(), left=-1),
            "left: expected a whole number of pixels, at least 0, got -1",
        ),
        (lambda: Canvas.extended(random_image(), top=1.5), "top: expected a whole number of pixels"),  # type: ignore[arg-type]
        (lambda: Canvas.extended(random_image()), "nothing to outpaint"),
        (lambda: Canvas.extended("absent.png", left=1), "absent"),
        (lambda: paste(random_image(), random_image(), right_half(), feather=-1), "feather: expected"),
        (lambda: paste(random_image(), random_image(), right_half(), seam=-1.0), "seam: expected"),
    ],
)
def test_invalid_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call()
