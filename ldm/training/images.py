"""Images as tensors in [−1, 1] and as arrays of bytes, and grids of them."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor


def to_tensor(images: np.ndarray) -> Tensor:
    """Convert (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [−1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_uint8(x: Tensor) -> np.ndarray:
    """Convert (B, 3, H, W) in [−1, 1] to (B, H, W, 3) uint8; values outside the range are clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange (B, H, W, 3) images row by row in one image, on white."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, c), 255, dtype=np.uint8)
    sheet[:n] = images
    return rearrange(sheet, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)


def comparison_grid(*versions: Tensor, columns: int) -> np.ndarray:
    """Arrange versions (B, 3, H, W) of the same images side by side in one image, (H', W', 3) uint8."""
    interleaved = torch.stack([version.cpu() for version in versions], 1).flatten(0, 1)
    return image_grid(to_uint8(interleaved), columns)
