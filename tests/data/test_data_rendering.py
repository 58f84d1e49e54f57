"""Rendered scenes against the blending equation in float64."""

import numpy as np
import pytest

from ldm.data import PALETTE, THING_COLOURS, Facts, Placement, Scene, Thing, recolour, render, render_batch
from ldm.data.recolouring import takes_colour
from ldm.data.rendering import coverage


def blend(rgba: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Blend in float64, without rounding."""
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + np.array(background) * (1 - alpha)


def scene(*placements, background=None, colours=(None, None)):
    """Return a scene of placements (row, x, y, side, tilt), each of its own thing."""
    placed = [
        Placement(thing=i, row=row, x=x, y=y, side=side, tilt=tilt)
        for i, (row, x, y, side, tilt) in enumerate(placements)
    ]
    things = tuple(Thing(name=f"n{i}", colour=colours[i]) for i in range(len(placed)))
    relation = "and" if len(things) == 2 else None
    return Scene(
        facts=Facts(things=things, relation=relation, background=background), placements=tuple(placed)
    )


def whole(row, background=None):
    return scene((row, 0.5, 0.5, 1.0, 0.0), background=background)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 4), dtype=np.uint8)


@pytest.fixture(scope="module")
def soft() -> np.ndarray:
    """Return images whose values vary slowly, so that resampling changes them little."""
    y, x = np.mgrid[:128, :128] / 127
    planes = [np.sin(3 * x + k) * np.cos(2 * y - k) for k in range(3)]
    alpha = np.clip(4 - 9 * np.hypot(x - 0.5, y - 0.5), 0, 1)
    return (np.stack([*(p * 0.5 + 0.5 for p in planes), alpha], -1) * 255).round().astype(np.uint8)[None]


@pytest.mark.parametrize("background", [None, *PALETTE])
def test_a_whole_image_is_the_blend_rounded_to_nearest(noise, background):
    expected = blend(noise[1], PALETTE[background or "white"])
    image = render(whole(1, background), noise, 64)
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    assert np.abs(image - expected).max() <= 0.5 + 1e-9  # rounding alone


def test_every_alpha_and_value_is_rounded_exactly():
    values, alphas = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.stack([values] * 3 + [alphas], axis=-1)[None]
    for background in ("black", "white", "gray"):
        exact = blend(rgba[0], PALETTE[background])
        assert np.abs(render(whole(0, background), rgba, 256) - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("side", [0.42, 0.5, 0.73, 1.0])
@pytest.mark.parametrize("where", [(0.5, 0.5), (0.5031, 0.4977), (0.513, 0.49)])
def test_an_image_is_where_it_is_placed(soft, side, where):
    """Compare with the image's values at the source position of each canvas pixel, bilinear."""
    x, y = where
    image = render(scene((0, x, y, side, 0.0), background="blue"), soft, 128).astype(float)
    at = (np.arange(128) + 0.5) / 128
    source = [((at - centre) / side + 0.5) * 128 - 0.5 for centre in (y, x)]
    clear = np.zeros((130, 130, 4))
    clear[1:-1, 1:-1] = soft[0]
    clear[..., :3] *= clear[..., 3:] / 255
    rows, columns = (np.clip(s + 1, 0, 129) for s in source)
    lower = [np.minimum(s.astype(int), 128) for s in (rows, columns)]
    dy, dx = (rows - lower[0])[:, None, None], (columns - lower[1])[None, :, None]
    corner = [clear[lower[0] + i][:, lower[1] + j] for i in (0, 1) for j in (0, 1)]
    value = (corner[0] * (1 - dx) + corner[1] * dx) * (1 - dy) + (corner[2] * (1 - dx) + corner[3] * dx) * dy
    expected = value[..., :3] + np.array(PALETTE["blue"]) * (1 - value[..., 3:] / 255)
    assert np.abs(image - expected).mean() < 0.6 and np.abs(image - expected).max() < 10


def test_a_tilted_image_turns_counterclockwise_about_its_centre(soft):
    upright = render(scene((0, 0.5, 0.5, 0.8, 0.0)), soft, 128).astype(float)
    for tilt in (6.0, -6.0):
        tilted = render(scene((0, 0.5, 0.5, 0.8, tilt)), soft, 128).astype(float)
        a, (y, x) = np.radians(tilt), np.mgrid[40:88, 40:88] - 63.5
        # the pixel at (x, y) shows what was at the position turned back, clockwise, with y downwards
        source = (x * np.cos(a) - y * np.sin(a) + 63.5, x * np.sin(a) + y * np.cos(a) + 63.5)
        column, row = (np.round(s).astype(int) for s in source)
        right = np.abs(tilted[40:88, 40:88] - upright[row, column]).mean()
        assert right < 2 and right < 0.5 * np.abs(tilted - upright)[40:88, 40:88].mean()


def test_a_quarter_turn_permutes_pixels(soft):
    upright = render(scene((0, 0.5, 0.5, 1.0, 0.0), background="green"), soft, 128).astype(int)
    turned = render(scene((0, 0.5, 0.5, 1.0, 90.0), background="green"), soft, 128).astype(int)
    assert np.abs(turned - np.rot90(upright)).max() <= 2


def test_opaque_white_stays_white_at_every_place_and_tilt():
    white = np.full((1, 128, 128, 4), 255, np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(30):
        made = render(scene((0, 0.5, 0.5, rng.uniform(0.3, 0.6), rng.uniform(-8, 8))), white, 96)
        assert made.min() == 255


@pytest.mark.parametrize("size", [64, 128, 96, 200])
def test_nothing_leaks_beyond_the_box(size):
    black = np.zeros((1, 64, 64, 4), np.uint8)
    black[..., 3] = 255
    image = render(scene((0, 0.3, 0.6, 0.4, 0.0)), black, size)
    dark = image[..., 0] < 250
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    assert rows[0] >= 0.4 * size - 1.5 and rows[-1] <= 0.8 * size + 0.5
    assert columns[0] >= 0.1 * size - 1.5 and columns[-1] <= 0.5 * size + 0.5
    assert (255 - image[..., 0].astype(int)).sum() / 255 == pytest.approx((0.4 * size) ** 2, rel=0.02)


def test_a_batch_equals_its_single_images(noise):
    scenes = [
        whole(0),
        scene((1, 0.3, 0.4, 0.45, 5.0), background="red"),
        scene((2, 0.25, 0.5, 0.5, 0.0), (0, 0.75, 0.5, 0.5, 0.0), colours=("red", "blue")),
    ]
    batch = render_batch(scenes, noise, 32)
    assert batch.shape == (3, 32, 32, 3)
    for image, one in zip(batch, scenes, strict=True):
        assert np.array_equal(image, render(one, noise, 32))
    assert render_batch([], noise, 32).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("size", [0, -8, 7])
def test_a_size_that_is_too_small_is_refused(noise, size):
    with pytest.raises(ValueError, match=f"size {size}"):
        render(whole(0), noise, size)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("size", [64, 32])
def test_coverage_is_what_the_rendered_image_shows(noise, two, size):
    """With a red and a green image on blue, the channels of the rendered image measure the coverage."""
    places = [(1, 0.25, 0.5, 0.5, 3.0), (2, 0.8, 0.4, 0.4, 0.0)][: 1 + two]
    got = coverage(scene(*places), noise, size)
    assert set(got) == {"first", "background"} | ({"second"} if two else set())
    assert np.abs(sum(got.values()) - 1).max() < 1e-6 and all(area.min() >= -1e-6 for area in got.values())
    painted = noise.copy()
    painted[..., :3] = 0
    painted[1, ..., 0] = painted[2, ..., 1] = 255
    image = render(scene(*places, background="blue"), painted, size).astype(float)
    assert (
        np.abs(image[..., 2] - 210 * got["background"]).max() <= 1.5
        and np.abs(image[..., 0] - 255 * got["first"] - 50 * got["background"]).max() <= 1.5
    )
    if two:
        assert np.abs(image[..., 1] - 255 * got["second"] - 100 * got["background"]).max() <= 1.5


@pytest.mark.parametrize("colour", THING_COLOURS)
def test_recolouring_follows_its_equation(colour):
    rgb = np.random.default_rng(1).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    weights = np.array([54, 183, 19]) / 256
    c = np.array(PALETTE[colour]) / 255
    own, level = float(c @ weights), (rgb[..., :3] / 255 @ weights)[..., None]
    expected = np.where(level < own, c * level / own, c + (1 - c) * (level - own) / (1 - own))
    made = recolour(rgb, colour)
    assert np.abs(made[..., :3] / 255 - expected).max() <= 0.5 / 255 + 1e-9
    assert np.array_equal(made[..., 3], rgb[..., 3])
    assert np.abs(made[..., :3] / 255 @ weights - level[..., 0]).max() < 1 / 255  # luminance is preserved
    assert recolour(np.zeros((1, 1, 3), np.uint8), colour).max() == 0
    assert recolour(np.full((1, 1, 3), 255, np.uint8), colour).min() == 255


def test_black_and_white_things_do_not_take_colours():
    def image(value, alpha=255):
        made = np.full((8, 8, 4), value, np.uint8)
        made[..., 3] = alpha
        return made

    assert takes_colour(image(110))
    assert not takes_colour(image(0)) and not takes_colour(image(255)) and not takes_colour(image(110, 0))
    half = image(255)
    half[:, :2] = 110  # a quarter of it is gray
    assert not takes_colour(half)
