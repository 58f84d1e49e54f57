"""Pixels as CLIP's vision towers take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# of the pixels CLIP was first trained on, kept by most models since
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(pixels: Tensor, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] to (B, 3, size, size): shorter side resized (bicubic, antialiased),
    centre cropped, standardised.

    ValueError for another shape, for integers, or for pixels out of [0, 1] by more than rounding. What
    bicubic overshoots is clamped.
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
        pixels = (
            F.interpolate(pixels.float(), shape, mode="bicubic", antialias=True).clamp(0, 1).to(pixels.dtype)
        )
        top, left = (round((side - size) / 2) for side in shape)
        pixels = pixels[..., top : top + size, left : left + size]
    offset, scale = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))
    return (pixels - offset) / scale
