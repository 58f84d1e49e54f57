"""Make the hints of controls from images: edges and scribbles, white on black, and tiles.

Edges are scikit-image's (the extra `control`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images.pixels import ImageInput, to_pixels
from ldm.support.scalars import check_kind, check_within, whole_number

FLAT = 1e-6  # largest slope of an image without edges, by rounding
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness (ITU-R BT.601)


def canny(image: ImageInput, *, low: float = 0.1, high: float = 0.2, sigma: float = 1.0) -> Tensor:
    """Return Canny's edges (Canny 1986), white on black, (B, 3, H, W) of 0 and 1.

    Args:
        image: One image or several; see `ImageInput`.
        low, high: Slopes, in [0, 1], from which on a pixel continues and begins an edge. Default: 0.1 and
            0.2.
        sigma: Standard deviation of the blur before, in pixels. Default: 1.

    Raises:
        ValueError: If a number is out of range.
        ImportError: If scikit-image is not installed.
    """
    for name, value in (("low", low), ("high", high), ("sigma", sigma)):
        check_kind(name, value, "float")
    check_within("high", high, 0, 1)
    check_within("low", low, 0, high)
    check_within("sigma", sigma, 0, 100)
    feature = _skimage().feature
    return _each(image, lambda gray: feature.canny(gray, sigma=sigma, low_threshold=low, high_threshold=high))


def soft_edge(image: ImageInput, *, sigma: float = 1.0) -> Tensor:
    """Return the slope of the brightness (Scharr's filter), white on black, (B, 3, H, W) in [0, 1].

    It is divided by its largest value. Networks such as HED draw softer edges, which are the user's to make.

    Args:
        image: One image or several; see `ImageInput`.
        sigma: Standard deviation of the blur before, in pixels. Default: 1.

    Raises:
        ValueError: If `sigma` is out of range.
        ImportError: If scikit-image is not installed.
    """
    check_kind("sigma", sigma, "float")
    check_within("sigma", sigma, 0, 100)
    filters = _skimage().filters

    def slope(gray: Any) -> Any:  # numpy arrays, as scikit-image takes and returns them
        found = filters.scharr(filters.gaussian(gray, sigma=sigma))
        largest = float(found.max())
        return found / largest if largest > FLAT else 0 * found

    return _each(image, slope)


def scribble(image: ImageInput, *, width: int = 5, threshold: float = 0.2) -> Tensor:
    """Return thick lines where the brightness changes most, white on black, (B, 3, H, W) of 0 and 1.

    Args:
        image: One image or several; see `ImageInput`.
        width: Width of the lines in pixels. Default: 5.
        threshold: The part, in [0, 1], of the largest slope from which on there is a line. Default: 0.2.

    Raises:
        ValueError: If a number is out of range.
        ImportError: If scikit-image is not installed.
    """
    check_kind("threshold", threshold, "float")
    check_within("threshold", threshold, 0, 1)
    side = whole_number("width", width, least=1, most=1000)
    morphology = _skimage().morphology
    slopes = soft_edge(image, sigma=2.0)[:, 0] >= threshold  # (B, H, W)
    thin = torch.stack([torch.from_numpy(morphology.skeletonize(each.numpy())) for each in slopes])
    thick = F.max_pool2d(thin[:, None].float(), side, stride=1, padding=side // 2)  # (B, 1, H', W')
    h, w = thin.shape[-2:]
    return thick[..., :h, :w].expand(-1, 3, -1, -1).contiguous()


def tile(image: ImageInput, *, factor: int = 8) -> Tensor:
    """Return images without their details, (B, 3, H, W) in [0, 1]: made smaller, and enlarged again.

    Args:
        image: One image or several; see `ImageInput`.
        factor: By how much they are made smaller. Default: 8.

    Raises:
        ValueError: If `factor` is not a whole number of at least 1.
    """
    pixels, factor = to_pixels(image), whole_number("factor", factor, least=1, most=1000)
    h, w = pixels.shape[-2:]
    small = F.interpolate(pixels, (max(h // factor, 1), max(w // factor, 1)), mode="area")
    return F.interpolate(small, (h, w), mode="bicubic", align_corners=False).clamp(0, 1)


def _skimage() -> Any:  # a package without type information
    try:
        from skimage import feature, filters, morphology
    except ImportError as error:
        raise ImportError("edges need scikit-image: pip install 'ldm[control]'") from error
    return SimpleNamespace(feature=feature, filters=filters, morphology=morphology)


def _each(image: ImageInput, edges: Callable[[Any], Any]) -> Tensor:
    """Return what a function makes of the brightness (H, W) of each image, as (B, 3, H, W), float32."""
    pixels = to_pixels(image)
    weights = torch.tensor(LUMA, device="cpu", dtype=torch.float32)[:, None, None]
    gray = (pixels * weights).sum(1)  # (B, H, W)
    found = torch.stack([torch.from_numpy(edges(each.double().numpy())).float() for each in gray])
    return found[:, None].expand(-1, 3, -1, -1).contiguous()
