"""Pictures, masks and depth maps as callers have them, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images.eight_bit import rgba

# a path, a PIL image, a tensor (3, H, W) or (B, 3, H, W) in [0, 1], a uint8 array (H, W, 3), or a sequence of
# these of one size
ImageInput = Any


def to_pixels(image: ImageInput) -> Tensor:
    """Pictures as (B, 3, H, W) float32 in [0, 1]; transparency is laid on white, files are read as `rgba`
    says.

    ValueError for another shape or range, or several sizes; FileNotFoundError for a path that leads nowhere.
    """
    if isinstance(image, Sequence) and not isinstance(image, str):
        parts = [to_pixels(part) for part in image]
        if not parts or len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                f"image: expected pictures of one size, got {[tuple(part.shape) for part in parts]}"
            )
        return torch.cat(parts)
    if isinstance(image, Tensor):
        return _checked(image[None] if image.ndim == 3 else image, 3, "image")
    array = _array(image, "image")
    if array.ndim == 2:
        array = array[..., None].expand(-1, -1, 3)
    if array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise ValueError(f"image: expected (H, W), (H, W, 3) or (H, W, 4), got {tuple(array.shape)}")
    pixels, alpha = array[..., :3].float() / 255, array[..., 3:].float() / 255
    if alpha.shape[-1]:
        pixels = pixels * alpha + (1 - alpha)
    return pixels.permute(2, 0, 1)[None].contiguous()


def to_mask(mask: ImageInput, size: Sequence[int]) -> Tensor:
    """A mask as (B, 1, H, W) of 0 and 1, 1 (white) where it says to repaint, cut at one half.

    ``size`` (H, W): the picture's, which the mask must have; ValueError otherwise.
    """
    if isinstance(mask, Tensor):
        values = mask.float()
        values = (
            values.reshape(1, 1, *values.shape)
            if values.ndim == 2
            else values[None]
            if values.ndim == 3
            else values
        )
        values = _checked(values, 1, "mask")
    else:
        array = _array(mask, "mask").float() / 255
        values = (array if array.ndim == 2 else array[..., :3].mean(-1))[None, None]
    if tuple(values.shape[-2:]) != tuple(size):
        raise ValueError(
            f"mask: expected the picture's size {size[0]}×{size[1]}, got"
            f" {values.shape[-2]}×{values.shape[-1]}"
        )
    return (values >= 0.5).float()


def to_depth(depth: ImageInput, size: Sequence[int]) -> Tensor:
    """Depth maps, (H, W) or (B, 1, H, W) in any unit, as (B, 1, h, w) in [−1, 1]: resized (bicubic), then
    each drawn to its own range."""
    values = depth.float() if isinstance(depth, Tensor) else _array(depth, "depth").float()
    if values.ndim == 2:
        values = values[None, None]
    if values.ndim != 4 or values.shape[1] != 1 or not bool(values.isfinite().all()):
        raise ValueError(f"depth: expected finite (H, W) or (B, 1, H, W), got {tuple(values.shape)}")
    values = F.interpolate(values, tuple(size), mode="bicubic", align_corners=False)
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return 2 * (values - low) / (high - low).clamp_min(1e-8) - 1


def _checked(values: Tensor, channels: int, name: str) -> Tensor:
    if values.ndim != 4 or values.shape[1] != channels or not values.is_floating_point():
        raise ValueError(
            f"{name}: expected floating-point (B, {channels}, H, W) in [0, 1], got {values.dtype}"
            f" {tuple(values.shape)}"
        )
    if values.numel() and not -0.01 <= float(values.min()) <= float(values.max()) <= 1.01:
        raise ValueError(
            f"{name}: expected [0, 1], got [{float(values.min()):.3g}, {float(values.max()):.3g}]"
        )
    return values.float()


def _array(image: Any, name: str) -> Tensor:
    """The numbers of a PIL image, an array or a file, as they are."""
    import numpy as np

    if isinstance(image, str | Path):
        from PIL import Image, UnidentifiedImageError

        path = Path(image)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file: {str(path)!r}")
        try:
            with Image.open(path) as opened:
                image = (
                    rgba(opened)
                    if name == "image"
                    else opened.convert("L" if name == "mask" else opened.mode)
                )
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{name}: {str(path)!r} is not a picture that can be read: {error}") from None
    if hasattr(image, "convert"):  # a PIL image
        image = rgba(image) if name == "image" else image.convert("L") if name == "mask" else image
    array = np.asarray(image)
    if name != "depth" and array.dtype != np.uint8:
        raise ValueError(
            f"{name}: expected 8-bit numbers, a tensor, a PIL image or a path, got {type(image).__name__} of"
            f" {array.dtype}"
        )
    return torch.from_numpy(array.copy())
