"""Images of every mode that files hold become the right pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_unclip import clip_pair

from ldm.images.pixels import to_pixels

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
