"""Frames, aspect-ratio buckets and the size conditions of SDXL."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.data.framing import Buckets, Frame, crop_to_frame, nearest_bucket, size_record


def ramp(height: int, width: int) -> Image.Image:
    """Return an image whose red grows with x and whose green grows with y, one level per pixel."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@pytest.mark.parametrize(("place", "left"), [(0.0, 0), (0.5, 20), (1.0, 40)])
def test_a_crop_without_scaling_is_exact(place, left):
    frame = Frame(height=60, width=60, place=place)
    crop = crop_to_frame(ramp(60, 100), frame)
    assert (crop == np.asarray(ramp(60, 100))[:, left : left + 60]).all()
    assert size_record(60, 100, frame) == ((60, 100), (0, left), (60, 60))


def test_a_mirrored_crop_is_recorded_in_the_mirrored_image():
    frame = Frame(height=60, width=60, place=0.25, mirrored=True)
    record = size_record(60, 100, frame)
    mirrored = np.asarray(ramp(60, 100))[:, ::-1]
    assert record.crop == (0, 30)
    assert (crop_to_frame(ramp(60, 100), frame) == mirrored[:, 30:90]).all()


@pytest.mark.parametrize("size", [(33, 97), (200, 120), (64, 64), (10, 240)])
@pytest.mark.parametrize("target", [(64, 64), (48, 96)])
def test_a_frame_is_covered_and_keeps_the_ratio(size, target):
    """A linear ramp stays linear when it is resized: its slope is the inverse of the scale."""
    crop = crop_to_frame(ramp(*size), Frame(*target)).astype(float)
    scale = max(target[0] / size[0], target[1] / size[1])
    assert crop.shape == (*target, 3)
    inner = crop[8:-8, 8:-8]
    assert np.diff(inner[..., 0], axis=1).mean() == pytest.approx(1 / scale, abs=0.03)
    assert np.diff(inner[..., 1], axis=0).mean() == pytest.approx(1 / scale, abs=0.03)
    record = size_record(*size, Frame(*target))
    for (resized, corner), side in zip(
        ((size[0] * scale, record.crop[0]), (size[1] * scale, record.crop[1])), target, strict=True
    ):
        assert corner == pytest.approx((resized - side) / 2, abs=0.51)


def test_buckets_are_multiples_of_the_step_within_the_area_and_the_ratio():
    sizes = Buckets().sizes(512)
    assert (512, 512) in sizes and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and height * width <= 512 * 512
        assert max(height / width, width / height) <= 2
        assert (height + 64) * width > 512 * 512  # none that is taller fits
    assert {(w, h) for h, w in sizes} == set(sizes)


def test_each_image_has_the_bucket_of_the_nearest_ratio():
    sizes = [(32, 64), (64, 64), (64, 32)]
    heights, widths = np.array([10, 100, 46, 44, 999]), np.array([100, 10, 64, 64, 1000])
    assert nearest_bucket(heights, widths, sizes).tolist() == [0, 2, 1, 0, 1]


def test_impossible_buckets_are_refused():
    with pytest.raises(ValueError, match="no size of at most 32"):
        Buckets(step=64).sizes(32)
    with pytest.raises(ValueError, match="ratio"):
        Buckets(ratio=0.5)
