"""Degradation of small images, which makes an upsampler robust to imperfect input.

Ramesh et al. 2022, section 2.1; BSRGAN (Zhang et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.training.config import check_at_least
from ldm.training.draws import Draws


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """Random blur, noise and block rounding of images in [−1, 1].

    Args:
        blur: Largest standard deviation of a Gaussian blur, in pixels of the small image; every image is
            blurred, by 0 to this amount. Default: 0.6.
        noise: Largest standard deviation of added noise. Default: 0.
        blocks: Largest step to which the cosine coefficients of 8×8 blocks are rounded, as in JPEG.
            Default: 0.
        share: Share of images that get noise, and of images that get rounded, in [0, 1]. Default: 0.5.
    """

    blur: float = 0.6
    noise: float = 0.0
    blocks: float = 0.0
    share: float = 0.5

    def __post_init__(self) -> None:
        check_at_least(0, blur=self.blur, noise=self.noise, blocks=self.blocks, share=self.share)
        if self.share > 1:
            raise ValueError(f"share: expected at most 1, got {self.share}")

    def __call__(self, small: Tensor, draws: Draws) -> Tensor:
        """Degrade each image by its own random amounts, in its own order.

        Args:
            small: Images, (n, 3, h, w) in [−1, 1].
            draws: The samples, which draw amounts, order and noise.

        Returns:
            The degraded images, (n, 3, h, w) in [−1, 1].
        """

        def amounts(most: float) -> Tensor:
            return torch.from_numpy(draws.random() * (draws.random() < self.share) * most).float()[
                :, None, None, None
            ]

        sigma = torch.from_numpy(draws.random() * self.blur).float()
        strength, step = amounts(self.noise), amounts(self.blocks)
        noise = draws.normal(*small.shape)
        small = small.clone()
        for kinds in np.stack([rng.permutation(3) for rng in draws.rngs], axis=1):
            for kind in range(3):
                chosen = torch.from_numpy(np.flatnonzero(kinds == kind))
                if kind == 0 and self.blur and len(chosen):
                    small[chosen] = blur(small[chosen], sigma[chosen], self.blur)
                elif kind == 1 and self.noise:
                    small[chosen] += strength[chosen] * noise[chosen]
                elif kind == 2 and self.blocks and len(chosen):
                    small[chosen] = round_blocks(small[chosen], step[chosen])
        return small.clamp(-1, 1)


def blur(x: Tensor, sigma: Tensor, most: float) -> Tensor:
    """Convolve each image with its own Gaussian; edges are repeated.

    Args:
        x: Images, (B, C, h, w).
        sigma: Standard deviation for each image in pixels, (B,).
        most: The largest standard deviation; the Gaussians are cut at three times it.

    Returns:
        The blurred images, (B, C, h, w).
    """
    radius = max(1, int(3 * most + 0.5))
    offset = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-offset.square() / (2 * sigma.to(x).clamp_min(1e-3)[:, None].square()))
    kernel = kernel / kernel.sum(1, keepdim=True)  # (B, 2r + 1)
    b, c, h, w = x.shape
    weight = kernel.repeat_interleave(c, 0)[:, None]  # (B·C, 1, 2r + 1)
    y = F.pad(x, (radius,) * 4, mode="replicate")
    y = rearrange(y, "b c h w -> 1 (b c) h w")
    y = F.conv2d(F.conv2d(y, weight[..., None], groups=b * c), weight[:, :, None], groups=b * c)
    return y.reshape(b, c, h, w)


def round_blocks(x: Tensor, step: Tensor) -> Tensor:
    """Round the cosine coefficients of 8×8 blocks to multiples of a step.

    Args:
        x: Images, (B, C, h, w).
        step: The step for each image, (B, 1, 1, 1); 0 leaves an image unchanged.

    Returns:
        The images, (B, C, h, w).
    """
    *_, h, w = x.shape
    y = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
    k = torch.arange(8, dtype=x.dtype, device=x.device)
    basis = torch.cos(torch.pi / 8 * (k + 0.5) * k[:, None]) / 2  # (frequency, position)
    basis[0] /= 2**0.5  # orthonormal
    blocks = rearrange(y, "b c (y i) (x j) -> b c y i x j", i=8, j=8)
    coefficients = torch.einsum("fi,bcyixj,gj->bcyfxg", basis, blocks, basis)
    size = step.to(x)[..., None, None]  # (B, 1, 1, 1, 1, 1)
    rounded = torch.where(size > 0, (coefficients / size.clamp_min(1e-6)).round() * size, coefficients)
    return torch.einsum("fi,bcyfxg,gj->bcyixj", basis, rounded, basis).reshape(y.shape)[..., :h, :w]
