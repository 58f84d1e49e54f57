"""Preparation of pixels for CLIP's vision towers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# mean and standard deviation of the pixels that OpenAI trained on; most later models use them too
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(pixels: Tensor, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Return pixels resized, cropped to a square, and standardized.

    The shorter side is resized to `size` (bicubic, antialiased, clamped to [0, 1]); the centre is cropped.

    Args:
        pixels: Images in [0, 1], shape (B, 3, H, W).
        size: Side S of the result, in pixels.
        mean: Mean of each channel, which is subtracted. Default: OpenAI's.
        std: Standard deviation of each channel, which divides. Default: OpenAI's.

    Returns:
        Shape (B, 3, S, S), in the dtype of `pixels`.

    Raises:
        ValueError: If the shape is another, the dtype is not floating point, or a value is below −0.01 or
            above 1.01.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"pixels: expected floating-point (B, 3, H, W) in [0, 1], got {pixels.dtype}"
            f" {tuple(pixels.shape)}"
        )
    if (
        not torch.compiler.is_compiling()
        and pixels.numel()
        and not (pixels.min() >= -0.01 and pixels.max() <= 1.01)
    ):
        raise ValueError(
            f"pixels: expected [0, 1], got [{float(pixels.min()):.3g}, {float(pixels.max()):.3g}]"
        )
    h, w = pixels.shape[-2:]
    if (h, w) != (size, size):
        short = min(h, w)
        shape = [size if side == short else int(size * side / short) for side in (h, w)]
        # (B, 3, S, ≥ S) or (B, 3, ≥ S, S)
        pixels = (
            F.interpolate(pixels.float(), shape, mode="bicubic", antialias=True).clamp(0, 1).to(pixels.dtype)
        )
        top, left = (round((side - size) / 2) for side in shape)
        pixels = pixels[..., top : top + size, left : left + size]  # (B, 3, S, S)
    offset, scale = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))  # (3, 1, 1) each
    return (pixels - offset) / scale
