"""Small pictures made worse, so that an upsampler does not believe them (Ramesh et al. 2022, section 2.1;
BSRGAN, Zhang et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.training.config import at_least


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """``blur``: the largest deviation of a Gaussian blur, in pixels of the small picture; ``noise``: the
    largest deviation of noise; ``blocks``: the largest step that an 8×8 block's cosine coefficients are
    rounded to, as in JPEG; each for pictures in [−1, 1], and 0 for none. ``share``: of pictures that get each
    of the last two; blur goes to all of them, from 0 on."""

    blur: float = 0.6
    noise: float = 0.0
    blocks: float = 0.0
    share: float = 0.5

    def __post_init__(self) -> None:
        at_least(0, blur=self.blur, noise=self.noise, blocks=self.blocks, share=self.share)
        if self.share > 1:
            raise ValueError(f"share: expected at most 1, got {self.share}")

    def __call__(self, small: Tensor, rng: np.random.Generator, noise: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) in [−1, 1], each made worse by its own amounts; blur, noise and rounding in
        an order drawn for the batch.

        noise: standard normal of the pictures' shape.
        """
        n = len(small)

        def amounts(most: float) -> Tensor:
            return torch.from_numpy(rng.random(n) * (rng.random(n) < self.share) * most).float()[
                :, None, None, None
            ]

        sigma, strength, step = (
            torch.from_numpy(rng.random(n) * self.blur).float(),
            amounts(self.noise),
            amounts(self.blocks),
        )
        for kind in rng.permutation(3):
            if kind == 0 and self.blur:
                small = blur(small, sigma)
            elif kind == 1 and self.noise:
                small = small + strength * noise
            elif kind == 2 and self.blocks:
                small = round_blocks(small, step)
        return small.clamp(-1, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """x (B, C, h, w) convolved with a Gaussian of deviation sigma (B,) in pixels, its own for each; the
    borders are repeated."""
    radius = max(1, int(3 * float(sigma.max()) + 0.5))
    place = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-place.square() / (2 * sigma.to(x).clamp_min(1e-3)[:, None].square()))
    kernel = kernel / kernel.sum(1, keepdim=True)  # (B, 2r + 1)
    b, c, h, w = x.shape
    weight = kernel.repeat_interleave(c, 0)[:, None]  # (B·C, 1, 2r + 1)
    y = F.pad(x, (radius,) * 4, mode="replicate").reshape(1, b * c, h + 2 * radius, w + 2 * radius)
    y = F.conv2d(F.conv2d(y, weight[..., None], groups=b * c), weight[:, :, None], groups=b * c)
    return y.reshape(b, c, h, w)


def round_blocks(x: Tensor, step: Tensor) -> Tensor:
    """x with the cosine coefficients of its 8×8 blocks rounded to multiples of step (B, 1, 1, 1); 0 leaves a
    picture as it is."""
    b, c, h, w = x.shape
    y = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
    k = torch.arange(8, dtype=x.dtype, device=x.device)
    # (frequency, place), orthonormal with the next line
    basis = torch.cos(torch.pi / 8 * (k + 0.5) * k[:, None]) / 2
    basis[0] /= 2**0.5
    blocks = y.reshape(b, c, y.shape[2] // 8, 8, y.shape[3] // 8, 8)
    coefficients = torch.einsum("fi,bcyixj,gj->bcyfxg", basis, blocks, basis)
    size = step.to(x)[..., None, None]  # (B, 1, 1, 1, 1, 1)
    rounded = torch.where(size > 0, (coefficients / size.clamp_min(1e-6)).round() * size, coefficients)
    return torch.einsum("fi,bcyfxg,gj->bcyixj", basis, rounded, basis).reshape(y.shape)[..., :h, :w]
