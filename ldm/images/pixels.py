"""Images, masks and depth maps from paths, PIL images, arrays and tensors, as tensors.

`ImageInput` lists what every `image=` argument of the library accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ldm.images.eight_bit import rgba

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

ImageInput: TypeAlias = "str | Path | Image | np.ndarray | Tensor | Sequence[ImageInput]"
"""What an `image=` argument accepts.

- `str`, `Path`: a file in any format that PIL reads. It is rotated as its EXIF orientation says; gray,
  palette, CMYK and 16-bit files are converted to 8-bit RGB. Where a task takes a prompt or an image in the
  same argument (`interpolate`, `UnCLIP.embed`), a `str` is a prompt and only a `Path` is a file.
- PIL image: converted in the same way.
- `np.ndarray`: uint8, shape (H, W), (H, W, 3) or (H, W, 4).
- `Tensor`: floating point in [0, 1], shape (3, H, W) or (B, 3, H, W).
- a sequence of these, all of one size: a batch.

Transparent pixels are composited on white. A call with a file is replayable from its recipe; one with an
image in memory is not.
"""


def to_pixels(image: ImageInput) -> Tensor:
    """Return images as a tensor (B, 3, H, W), float32 in [0, 1].

    Args:
        image: One image or a sequence of images of one size; see `ImageInput`.

    Raises:
        ValueError: For another shape or range, images of several sizes, or a file that is not an image.
        FileNotFoundError: If a path does not exist.
    """
    if isinstance(image, Sequence) and not isinstance(image, str):
        parts = [to_pixels(part) for part in image]
        if not parts or len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                f"image: expected images of one size, got {[tuple(part.shape) for part in parts]}"
            )
        return torch.cat(parts)
    if isinstance(image, Tensor):
        return check_pixel_tensor(image[None] if image.ndim == 3 else image, 3, "image")
    values = read_values(image, "image")
    if values.ndim == 2:
        values = repeat(values, "h w -> h w c", c=3)
    if values.ndim != 3 or values.shape[-1] not in (3, 4):
        raise ValueError(f"image: expected (H, W), (H, W, 3) or (H, W, 4), got {tuple(values.shape)}")
    pixels, alpha = values[..., :3].float() / 255, values[..., 3:].float() / 255
    if alpha.shape[-1]:
        pixels = pixels * alpha + (1 - alpha)
    return rearrange(pixels, "h w c -> 1 c h w").contiguous()


def to_mask(mask: ImageInput, size: Sequence[int]) -> Tensor:
    """Return a mask as a tensor (B, 1, H, W) of 0 and 1: 1 where the image is repainted.

    Args:
        mask: One mask, white (1) where to repaint, thresholded at one half. A file, PIL image or uint8 array
            as in `ImageInput`, or a floating-point tensor (H, W), (1, H, W) or (B, 1, H, W) in [0, 1].
        size: (H, W) of the image.

    Raises:
        ValueError: If the mask has another size, shape or range.
        FileNotFoundError: If a path does not exist.
    """
    if isinstance(mask, Tensor):
        values = mask.float()
        while 2 <= values.ndim < 4:
            values = values[None]
        values = check_pixel_tensor(values, 1, "mask")
    else:
        gray = read_values(mask, "mask").float() / 255
        values = (gray if gray.ndim == 2 else gray[..., :3].mean(-1))[None, None]
    if tuple(values.shape[-2:]) != tuple(size):
        raise ValueError(
            f"mask: expected the image's size {size[0]}×{size[1]}, got {values.shape[-2]}×{values.shape[-1]}"
        )
    return (values >= 0.5).float()


def to_depth(depth: ImageInput, size: Sequence[int]) -> Tensor:
    """Return depth maps as a tensor (B, 1, h, w) in [−1, 1], each normalized to its own range.

    Args:
        depth: Depth maps in any unit, larger being nearer: a file, PIL image or array (H, W), or a tensor
            (H, W) or (B, 1, H, W).
        size: (h, w), to which the maps are resized (bicubic) before they are normalized.

    Raises:
        ValueError: For another shape, or values that are not finite.
        FileNotFoundError: If a path does not exist.
    """
    values = depth.float() if isinstance(depth, Tensor) else read_values(depth, "depth").float()
    if values.ndim == 2:
        values = values[None, None]
    if values.ndim != 4 or values.shape[1] != 1 or not bool(values.isfinite().all()):
        raise ValueError(f"depth: expected finite (H, W) or (B, 1, H, W), got {tuple(values.shape)}")
    values = F.interpolate(values, tuple(size), mode="bicubic", align_corners=False)  # (B, 1, h, w)
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return 2 * (values - low) / (high - low).clamp_min(1e-8) - 1


def check_pixel_tensor(values: Tensor, channels: int, name: str) -> Tensor:
    """Return a tensor (B, channels, H, W) in [0, 1] as float32; ValueError for another shape or range."""
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


def read_values(image: ImageInput, name: Literal["image", "mask", "depth"]) -> Tensor:
    """Return the values of a file, PIL image or array: uint8 for images and masks, unchanged for depth."""
    import numpy as np

    if isinstance(image, str | Path):
        from PIL import Image, UnidentifiedImageError

        path = Path(image)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file: {str(path)!r}")
        try:
            with Image.open(path) as opened:
                image = convert_mode(opened, name)
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name}: {str(path)!r} is not a readable image: {error}") from None
    elif is_pil(image):
        image = convert_mode(image, name)
    array = np.asarray(image)
    if name != "depth" and array.dtype != np.uint8:
        raise ValueError(
            f"{name}: expected 8-bit values, a tensor, a PIL image or a path, got {type(image).__name__} of"
            f" {array.dtype}"
        )
    return torch.from_numpy(array.copy())


def is_pil(image: object) -> TypeGuard[Image]:
    """Return whether an object is a PIL image, without importing PIL."""
    return hasattr(image, "convert")


def convert_mode(image: Image, name: Literal["image", "mask", "depth"]) -> Image:
    """Return a PIL image as RGBA (image), as gray (mask) or in its own mode (depth)."""
    return rgba(image) if name == "image" else image.convert("L" if name == "mask" else image.mode)
