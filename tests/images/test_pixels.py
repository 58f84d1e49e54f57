"""Images of every mode that files hold become the right pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_unclip import clip_pair

from ldm.images.pixels import to_depth, to_mask, to_pixels

# (3, 2, 3)
COLORS = np.array(
    [[[255, 0, 0], [0, 128, 255]], [[20, 30, 40], [250, 240, 10]], [[0, 0, 0], [255, 255, 255]]],
    dtype=np.uint8,
)
RGB = torch.from_numpy(COLORS).permute(2, 0, 1)[None] / 255


def save(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


def test_alpha_is_composited_on_white(tmp_path):
    alpha = np.array([[255, 0], [128, 64], [255, 255]], dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(np.dstack([COLORS, alpha])))
    a = torch.from_numpy(alpha)[None, None] / 255
    assert torch.allclose(to_pixels(path), RGB * a + 1 - a, atol=1e-6)
    palette = Image.fromarray(COLORS).convert("P", palette=Image.Palette.ADAPTIVE)
    assert torch.allclose(to_pixels(palette), RGB, atol=2 / 255)


def test_cmyk_and_gray_become_rgb(tmp_path):
    cmyk = Image.fromarray(COLORS).convert("CMYK")
    path = save(tmp_path / "c.tif", cmyk)
    assert torch.allclose(to_pixels(path), RGB, atol=1 / 255) and torch.equal(
        to_pixels(path), to_pixels(cmyk)
    )
    gray = Image.fromarray(COLORS[..., 0])
    assert torch.equal(to_pixels(gray), RGB[:, :1].expand(-1, 3, -1, -1))
    with_alpha = Image.merge("LA", [gray, Image.new("L", gray.size, 0)])
    assert torch.equal(to_pixels(with_alpha), torch.ones(1, 3, 3, 2))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 257], [32_768, 65_535]], dtype=np.uint16)
    path = save(tmp_path / "s.png", Image.fromarray(values))
    expected = torch.tensor([[0.0, 1 / 255], [128 / 255, 1.0]])
    assert torch.allclose(to_pixels(path)[0, 0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="16-bit values, 0 to 65535"):
        to_pixels(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)))
    with pytest.raises(ValueError, match="floating-point"):
        to_pixels(Image.fromarray(np.zeros((2, 2), dtype=np.float32)))


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(COLORS)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    path = save(tmp_path / "e.png", image, exif=exif)
    assert torch.allclose(to_pixels(path), RGB.rot90(-1, (2, 3)), atol=1e-6)


def test_an_image_one_pixel_wide_is_read_and_refused_by_clip(tmp_path):
    path = save(tmp_path / "w.png", Image.fromarray(np.zeros((300, 1, 3), dtype=np.uint8)))
    pixels = to_pixels(path)
    assert pixels.shape == (1, 3, 300, 1)
    with pytest.raises(ValueError, match="only the square in the middle of 1×300"):
        clip_pair("x").image_embedding(pixels)
    assert clip_pair("x").image_embedding(to_pixels(np.zeros((5, 1, 3), dtype=np.uint8))).vector.shape == (
        1,
        24,
    )


SIZE = (4, 4)
HOLE = torch.zeros(1, 1, *SIZE)
HOLE[..., 1:3, 1:3] = 1


def layer(color: tuple[int, int, int], opaque: torch.Tensor, hidden: int = 255) -> Image.Image:
    """Return an RGBA image of one color where `opaque` (1, 1, H, W) is 1, transparent elsewhere."""
    rgba = np.full((*SIZE, 4), hidden, dtype=np.uint8)
    inside = opaque[0, 0].numpy() == 1
    rgba[..., 3] = 255 * inside
    rgba[inside, :3] = color
    return Image.fromarray(rgba)


@pytest.mark.parametrize("hidden", [0, 255])
def test_a_brush_layer_is_repainted_where_it_is_opaque(hidden):
    assert torch.equal(to_mask(layer((255, 255, 255), HOLE, hidden), SIZE), HOLE)


@pytest.mark.parametrize("color", [(0, 0, 0), (200, 30, 30), (250, 250, 20)])
@pytest.mark.parametrize("hidden", [0, 255])
def test_an_image_with_a_hole_is_repainted_where_it_is_transparent(color, hidden):
    assert torch.equal(to_mask(layer(color, 1 - HOLE, hidden), SIZE), HOLE)


def test_an_opaque_mask_with_an_alpha_channel_is_read_by_its_color():
    rgba = np.full((*SIZE, 4), 255, dtype=np.uint8)
    rgba[..., :3] = 255 * HOLE[0, 0].numpy().astype(np.uint8)[..., None]
    assert torch.equal(to_mask(Image.fromarray(rgba), SIZE), HOLE)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_sixteen_bit_masks_are_thresholded_at_one_half(tmp_path, share):
    values = np.full(SIZE, round(share * 65_535), dtype=np.uint16)
    for mask in (save(tmp_path / "m.png", Image.fromarray(values)), Image.fromarray(values), values):
        assert torch.equal(to_mask(mask, SIZE), torch.full((1, 1, *SIZE), float(share > 0.5)))


def test_masks_of_every_type_are_equal(tmp_path):
    values = HOLE[0, 0].numpy()
    palette = Image.fromarray((255 * values).astype(np.uint8)).convert("P")
    same = [
        values.astype(bool),
        values.astype(np.float64),
        (255 * values).astype(np.uint8),
        torch.from_numpy(values).bool(),
        HOLE,
        HOLE[0].half(),
        (255 * HOLE[0]).to(torch.uint8),
        palette,
        save(tmp_path / "m.png", palette),
        Image.fromarray(values.astype(bool)),
    ]
    for mask in same:
        assert torch.equal(to_mask(mask, SIZE), HOLE), type(mask)
    assert torch.equal(to_mask([values, 1 - values], SIZE), torch.cat([HOLE, 1 - HOLE]))


def test_a_rotated_mask_follows_its_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    values = np.zeros((2, 4), dtype=np.uint8)
    values[0, 0] = 255
    path = save(tmp_path / "m.png", Image.fromarray(values), exif=exif)
    assert torch.equal(to_mask(path, (4, 2)).nonzero()[0, 2:], torch.tensor([0, 1]))


def test_arrays_and_tensors_of_every_type_are_equal():
    wide = COLORS.astype(np.uint16) * 257
    for image in (COLORS, wide, COLORS / 255, RGB, RGB.double(), torch.from_numpy(COLORS).permute(2, 0, 1)):
        assert torch.allclose(to_pixels(image), RGB, atol=1e-6)
    assert torch.equal(to_pixels(np.stack([COLORS, COLORS])), torch.cat([RGB, RGB]))
    for wrong in (COLORS.astype(np.int64), COLORS.astype(np.float32), np.array(["a"]), COLORS > 9):
        with pytest.raises(ValueError, match="image: expected"):
            to_pixels(wrong)


def test_depth_maps_of_every_type_are_equal(tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 1000
    expected = to_depth(torch.from_numpy(values.astype(np.float32)), SIZE)
    gray = np.repeat(values[..., None], 3, axis=-1)
    for depth in (values, values.astype(np.int32), gray, save(tmp_path / "d.png", Image.fromarray(values))):
        assert torch.allclose(to_depth(depth, SIZE), expected, atol=1e-6)
    with pytest.raises(ValueError, match="depth: expected finite values in one channel"):
        to_depth(COLORS, SIZE)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("d.tif", "CMYK"),
        ("d.jpg", "CMYK"),
        ("d.png", "L"),
        ("d.png", "P"),
        ("d.png", "LA"),
        ("d.tif", "YCbCr"),
    ],
)
def test_depth_maps_of_every_mode_are_equal(tmp_path, name, mode):
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    gray = Image.fromarray(values)
    path = save(tmp_path / name, gray.convert(mode), quality=100)
    assert torch.allclose(
        to_depth(path, SIZE), to_depth(values, SIZE), atol=2 * 2 / 240
    )  # two levels of JPEG
