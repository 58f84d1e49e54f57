"""Images, masks and depth maps from paths, PIL images, arrays and tensors, as tensors.

`ImageInput` lists what every `image=`, `mask=` and `depth=` argument of the library accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.images.eight_bit import GRAY_MODES, eight_bit
from ldm.images.opening import check_pixels, decode_image
from ldm.support.text import escaped

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

ImageInput: TypeAlias = "str | Path | Image | np.ndarray | Tensor | Sequence[ImageInput]"
"""What an argument that is an image accepts.

- `str`, `Path`: a PNG, JPEG, GIF, BMP, WebP or TIFF file. It is rotated as its EXIF orientation says; gray,
  palette, CMYK and 16-bit files are converted to 8-bit RGB. Where a task takes a prompt or an image in the
  same argument (`interpolate`, `UnCLIP.embed`), a `str` is a prompt and only a `Path` is a file.
- PIL image: converted in the same way.
- `np.ndarray`: (H, W), (H, W, C) or (B, H, W, C) with 1, 3 or 4 channels; uint8, uint16 (65535 is 1), or
  floating point in [0, 1].
- `Tensor`: (H, W), (C, H, W) or (B, C, H, W) with 1, 3 or 4 channels; uint8, or floating point in [0, 1].
- a sequence of these, all of one size: a batch.

The fourth channel is opacity. Transparent pixels of an image are composited on white. A mask may also be of
bool; where it has transparent pixels, see `to_mask`. A call with a file is replayable from its recipe; one
with an image in memory is not. An image has at most `ldm.images.opening.MAX_PIXELS` pixels.
"""
Role = Literal["image", "mask", "depth"]
CHANNELS = (1, 3, 4)
WHITE = 0.9  # of every channel, from which on the pixels of a brush layer are white


def to_pixels(image: ImageInput) -> Tensor:
    """Return images as a tensor (B, 3, H, W), float32 in [0, 1].

    Args:
        image: One image or a sequence of images of one size; see `ImageInput`.

    Raises:
        ValueError: For another shape, dtype or range, images of several sizes, or a file that is not an
            image.
        FileNotFoundError: If a path does not exist.
    """
    values = read_batch(image, "image")
    pixels = values[:, :3].expand(-1, 3, -1, -1)
    if values.shape[1] == 4:
        alpha = values[:, 3:]
        pixels = pixels * alpha
        pixels += 1 - alpha
    return pixels.contiguous()


def to_mask(mask: ImageInput, size: Sequence[int]) -> Tensor:
    """Return a mask as a tensor (B, 1, H, W) of 0 and 1: 1 where the image is repainted.

    Without transparent pixels, a mask is white where to repaint: its mean over color channels is thresholded
    at one half. With transparent pixels, it is either a brush layer or an image with a hole. If all its
    opaque pixels are white, it is a brush layer, and they are repainted. Else it is an image with a hole (as
    DALL·E 2's masks are), and the transparent pixels are repainted.

    Args:
        mask: One mask or a sequence of masks of one size; see `ImageInput`.
        size: (H, W) of the image.

    Raises:
        ValueError: If the mask has another size, shape, dtype or range.
        FileNotFoundError: If a path does not exist.
    """
    values = read_batch(mask, "mask")
    if tuple(values.shape[-2:]) != tuple(size):
        raise ValueError(
            f"mask: expected the image's size {size[0]}×{size[1]}, got {values.shape[-2]}×{values.shape[-1]}"
        )
    white = (values[:, :3].mean(1, keepdim=True) >= 0.5).float()  # (B, 1, H, W)
    if values.shape[1] < 4:
        return white
    opaque = (values[:, 3:] >= 0.5).float()
    transparent = 1 - opaque
    brush = ((values[:, :3].amin(1, keepdim=True) >= WHITE) | (opaque == 0)).flatten(1).all(1)  # (B,)
    layered = torch.where(brush[:, None, None, None], opaque, transparent)
    has_hole = transparent.flatten(1).any(1)[:, None, None, None]
    return torch.where(has_hole, layered, white)


def to_depth(depth: ImageInput, size: Sequence[int]) -> Tensor:
    """Return depth maps as a tensor (B, 1, h, w) in [−1, 1], each normalized to its own range.

    Args:
        depth: Depth maps in any unit, larger being nearer: files, PIL images or arrays (H, W), or tensors
            (H, W) or (B, 1, H, W), of any dtype; of three equal channels one is taken.
        size: (h, w), to which the maps are resized (bicubic) before they are normalized.

    Raises:
        ValueError: For another shape, channels that differ, or values that are not finite.
        FileNotFoundError: If a path does not exist.
    """
    values = read_batch(depth, "depth")
    if values.shape[1] == 4 and bool((values[:, 3] == values[:, 3].max()).all()):
        values = values[:, :3]  # opaque everywhere
    if values.shape[1] == 3 and bool((values == values[:, :1]).all()):
        values = values[:, :1]
    if values.shape[1] != 1 or not bool(values.isfinite().all()):
        raise ValueError(f"depth: expected finite values in one channel, got {tuple(values.shape)}")
    values = F.interpolate(values, tuple(size), mode="bicubic", align_corners=False)  # (B, 1, h, w)
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return 2 * (values - low) / (high - low).clamp_min(1e-8) - 1


def read_batch(image: ImageInput, role: Role) -> Tensor:
    """Return images, masks or depth maps as a tensor (B, C, H, W), float32, with 1, 3 or 4 channels.

    Args:
        image: See `ImageInput`.
        role: Name of the argument, for messages. Images and masks are in [0, 1]; depth is in its own unit.

    Raises:
        ValueError, FileNotFoundError: See `to_pixels`.
    """
    if isinstance(image, Sequence) and not isinstance(image, str):
        parts = [read_batch(part, role) for part in image]
        if role != "depth" and parts:
            channels = max(part.shape[1] for part in parts)
            parts = [with_channels(part, channels) for part in parts]
        if not parts or len({part.shape[1:] for part in parts}) > 1:
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"{role}: expected {role}s of one size, got {shapes}")
        return torch.cat(parts)
    if isinstance(image, Tensor):
        values = image[None, None] if image.ndim == 2 else image[None] if image.ndim == 3 else image
        layout = "(H, W), (C, H, W) or (B, C, H, W)"
    else:
        values = array_values(image, role)
        if values.ndim == 2:
            values = values[..., None]
        values = values[None] if values.ndim == 3 else values
        layout = "(H, W), (H, W, C) or (B, H, W, C)"
        if values.ndim == 4:
            values = rearrange(values, "b h w c -> b c h w")
    if values.ndim != 4 or values.shape[1] not in CHANNELS:
        given = tuple(image.shape) if hasattr(image, "shape") else tuple(values.shape)
        raise ValueError(f"{role}: expected {layout} with 1, 3 or 4 channels, got {given}")
    check_pixels(values.shape[-1], values.shape[-2], role)
    return scaled(values.contiguous(), role)


def with_channels(values: Tensor, channels: int) -> Tensor:
    """Return (B, 1, 3 or 4, H, W) with at least as many channels: gray as color, then opaque."""
    if channels > 1 and values.shape[1] == 1:
        values = values.expand(-1, 3, -1, -1)
    return F.pad(values, (0, 0, 0, 0, 0, 1), value=1.0) if channels == 4 and values.shape[1] == 3 else values


def scaled(values: Tensor, role: Role) -> Tensor:
    """Return values as float32, whole numbers scaled to [0, 1]; ValueError for another dtype or range."""
    if role == "depth":
        return values.float()
    if values.dtype == torch.uint8:
        return values.float().div_(255)  # in place: half the memory
    if values.dtype == torch.uint16:
        return values.float().div_(65535)
    if values.dtype == torch.bool and role == "mask":
        return values.float()
    if not values.is_floating_point():
        kinds = "uint8, uint16 or floating point" + (" or bool" if role == "mask" else "")
        raise ValueError(f"{role}: expected {kinds}, got {str(values.dtype).removeprefix('torch.')}")
    if values.numel() and not -0.01 <= float(values.min()) <= float(values.max()) <= 1.01:
        low, high = float(values.min()), float(values.max())
        raise ValueError(f"{role}: expected [0, 1], got [{low:.3g}, {high:.3g}]")
    return values.float()


def array_values(image: str | Path | Image | np.ndarray, role: Role) -> Tensor:
    """Return the values of a file, PIL image or array, in its own dtype; images and masks have 8 bits."""
    import numpy as np

    if isinstance(image, str | Path):
        array = decode_image(image, lambda opened: np.array(convert_mode(opened, role)), name=role)
    elif is_pil(image):
        try:
            array = np.array(convert_mode(image, role))
        except Exception as error:  # it may be a file that is decoded only now
            raise ValueError(f"{role}: {escaped(str(error) or type(error).__name__, 300)}") from None
    else:
        array = np.array(image)
    if array.dtype.kind not in "buif":
        raise ValueError(f"{role}: expected an image, got {type(image).__name__} of {array.dtype}")
    if array.dtype.kind in "ui" and role == "depth":
        array = array.astype(np.float64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def is_pil(image: object) -> TypeGuard[Image]:
    """Return whether an object is a PIL image, without importing PIL."""
    return hasattr(image, "convert")


def convert_mode(image: Image, role: Role) -> Image:
    """Return a PIL image upright: with 8 bits, or a gray depth map in its own mode."""
    from PIL import ImageOps

    check_pixels(*image.size)
    upright: Image = ImageOps.exif_transpose(image)
    return upright if role == "depth" and upright.mode in GRAY_MODES else eight_bit(upright)
