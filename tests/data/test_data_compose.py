"""Rendered compositions against the blending equation in float64."""

import numpy as np
import pytest

from ldm.data import PALETTE, Composition, render, render_batch
from ldm.data.compose import coverage


def blend(rgba: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Blend in float64, without rounding."""
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + np.array(background) * (1 - alpha)


def boxes(image: np.ndarray, factor: int) -> np.ndarray:
    side = len(image) // factor
    return image.reshape(side, factor, side, factor, -1).mean(axis=(1, 3))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 4), dtype=np.uint8)


@pytest.mark.parametrize("background", [None, *PALETTE])
@pytest.mark.parametrize("size", [64, 32, 16])
def test_full_size_is_the_blend_rounded_to_nearest(noise, background, size):
    expected = boxes(blend(noise[1], PALETTE[background or "white"]), 64 // size)
    image = render(Composition(image=1, background=background), noise, size)
    assert image.dtype == np.uint8 and image.shape == (size, size, 3)
    assert np.abs(image - expected).max() <= 0.5 + 1e-9  # rounding alone


def test_every_alpha_and_value_is_rounded_exactly():
    values, alphas = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.stack([values] * 3 + [alphas], axis=-1)[None]
    for background in ("black", "white", "gray"):
        exact = blend(rgba[0], PALETTE[background])
        assert (
            np.abs(render(Composition(image=0, background=background), rgba, 256) - exact).max() <= 0.5 + 1e-9
        )


@pytest.mark.parametrize(
    ("place", "top", "left"),
    [
        ("centre", 16, 16),
        ("left", 16, 2),
        ("right", 16, 30),
        ("top", 2, 16),
        ("bottom", 30, 16),
        ("top left", 2, 2),
        ("top right", 2, 30),
        ("bottom left", 30, 2),
        ("bottom right", 30, 30),
    ],
)
def test_a_small_image_stands_at_its_place(noise, place, top, left):
    image = render(Composition(image=2, background="blue", size="small", place=place), noise, 64)
    expected = np.broadcast_to(np.array(PALETTE["blue"], dtype=float), (64, 64, 3)).copy()
    expected[top : top + 32, left : left + 32] = boxes(blend(noise[2], PALETTE["blue"]), 2)
    assert np.abs(image - expected).max() <= 0.5 + 1e-9


def test_of_two_images_the_first_stands_on_the_left(noise):
    image = render(Composition(image=0, second=2, background="pink"), noise, 64)
    expected = np.broadcast_to(np.array(PALETTE["pink"], dtype=float), (64, 64, 3)).copy()
    expected[16:48, :32] = boxes(blend(noise[0], PALETTE["pink"]), 2)
    expected[16:48, 32:] = boxes(blend(noise[2], PALETTE["pink"]), 2)
    assert np.abs(image - expected).max() <= 0.5 + 1e-9


def test_a_batch_equals_its_single_images(noise):
    compositions = [
        Composition(image=0),
        Composition(image=1, background="red", size="small", place="top"),
        Composition(image=2, second=0),
    ]
    batch = render_batch(compositions, noise, 32)
    assert batch.shape == (3, 32, 32, 3)
    for image, composition in zip(batch, compositions, strict=True):
        assert np.array_equal(image, render(composition, noise, 32))
    assert render_batch([], noise, 32).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("size", [0, 48, 128, 1])
def test_a_size_that_does_not_divide_is_refused(noise, size):
    with pytest.raises(ValueError, match=f"size {size}"):
        render(Composition(image=0), noise, size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"background": "blu"}, "did you mean 'blue'"),
        ({"size": "smal"}, "did you mean 'small'"),
        ({"size": "small", "place": "botom"}, "did you mean 'bottom'"),
        ({"place": "left"}, "only a small image"),
        ({"second": 1, "size": "small"}, "two images side by side"),
    ],
)
def test_impossible_compositions_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Composition(image=0, **wrong)


@pytest.mark.parametrize("made", [{}, {"size": "small", "place": "bottom left"}, {"second": 2}])
@pytest.mark.parametrize("size", [64, 32])
def test_coverage_is_what_the_rendered_image_shows(noise, made, size):
    """With a red and a green image on blue, the channels of the rendered image measure the coverage."""
    got = coverage(Composition(image=1, **made), noise, size)
    assert set(got) == {"first", "background"} | ({"second"} if "second" in made else set())
    assert np.abs(sum(got.values()) - 1).max() < 1e-6 and all(area.min() >= 0 for area in got.values())
    painted = noise.copy()
    painted[..., :3] = 0
    painted[1, ..., 0] = painted[2, ..., 1] = 255
    image = render(Composition(image=1, background="blue", **made), painted, size).astype(float)
    assert (
        np.abs(image[..., 2] - 210 * got["background"]).max() <= 1.5
        and np.abs(image[..., 0] - 255 * got["first"] - 50 * got["background"]).max() <= 1.5
    )
    if "second" in made:
        assert np.abs(image[..., 1] - 255 * got["second"] - 100 * got["background"]).max() <= 1.5
