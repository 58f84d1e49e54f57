"""The judge of emoji models: which image of the data set an image is nearest to, and its background colour.

A fixed rule instead of a network: mean squared error against every image of the data set composed on the
requested background, at 64×64, the minimum over shifts by up to ±3 pixels and scalings by 0.9 to 1.1. Areas
that a shift or a scaling uncovers are filled with the background colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import PALETTE, EmojiData

SIZE, SHIFT, SCALES = 64, 3, (0.9, 0.95, 1.0, 1.05, 1.1)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement of one image.

    Attributes:
        name: The requested name.
        background: The requested background colour; None is white.
        rank: How many images of the data set are nearer than the nearest one of that name (any style); 0 is
            a hit, below 5 is in the top five.
        nearest: The name of the nearest image.
        nearest_style: The style of the nearest image.
        mse: The mean squared error to the nearest image, for values in [0, 1].
        background_seen: The palette's colour nearest to the corners.
    """

    name: str
    background: str | None
    rank: int
    nearest: str
    nearest_style: str
    mse: float
    background_seen: str

    @property
    def background_right(self) -> bool:
        return self.background_seen == (self.background or "white")


class EmojiJudge:
    """Judge images against all images of a data set, including held-out ones."""

    def __init__(self, data: EmojiData) -> None:
        self.index = data.index
        source = (
            torch.from_numpy(data.images[:])
            if data.images.flags.writeable
            else torch.from_numpy(data.images.copy())
        )
        colours, alphas = [], []
        for part in source.split(256):
            rgba = part.permute(0, 3, 1, 2).float() / 255  # (n, 4, P, P), straight alpha
            rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
            rgba = F.interpolate(rgba, size=(SIZE, SIZE), mode="area")
            colours.append(rgba[:, :3])
            alphas.append(rgba[:, 3:])
        # (N, 3, 64, 64) times alpha, (N, 1, 64, 64)
        self._colour, self._alpha = (torch.cat(colours), torch.cat(alphas))
        rows: dict[str, list[int]] = {}
        for i, row in enumerate(self.index):
            rows.setdefault(row.name, []).append(i)
        self._rows_of = rows

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, names: Sequence[str], backgrounds: Sequence[str | None]
    ) -> list[Verdict]:
        """Return one verdict per image.

        Args:
            images: Images, shape (B, 3, H, W), in [0, 1].
            names: The requested names, such as "red-apple".
            backgrounds: The requested background colours of the palette, or None for white.

        Raises:
            ValueError: If the shapes do not match or a name is not in the data set.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) == len(names) == len(backgrounds):
            raise ValueError(
                f"expected (B, 3, H, W) with B names and backgrounds, got {tuple(images.shape)},"
                f" {len(names)} and {len(backgrounds)}"
            )
        unknown = [name for name in names if name not in self._rows_of]
        if unknown:
            raise ValueError(f"names that the data set does not have: {unknown[:5]}")
        images = images.float()
        verdicts: dict[int, Verdict] = {}
        for background in dict.fromkeys(backgrounds):
            gallery = self._gallery(background)
            coarse = _pool(gallery)
            for i in (i for i, asked in enumerate(backgrounds) if asked == background):
                distance = self._distances(images[i], names[i], background, gallery, coarse)
                verdicts[i] = self._verdict(distance, images[i], names[i], background)
        return [verdicts[i] for i in range(len(images))]

    def _gallery(self, background: str | None) -> Tensor:
        """Return the images composed on a background minus the background, (N, 3, 64, 64).

        Differences between images are unaffected, and float32 rounds less near zero.
        """
        return self._colour - _colour(background) * self._alpha

    def _distances(
        self, image: Tensor, name: str, background: str | None, gallery: Tensor, coarse: Tensor
    ) -> Tensor:
        """Return the minimum mean squared error of an image's copies to each image of the data set, (N,).

        Exact up to the requested name's distance; infinite where it is certainly larger. The error between
        box means is a lower bound of the error between images (Jensen), so most images are excluded without a
        comparison at full size.
        """
        copies = shifted_and_scaled(image - _colour(background))  # (K, 3, 64, 64)
        distance = torch.full((len(gallery),), torch.inf)
        own = torch.tensor(self._rows_of[name])
        distance[own] = least_mse(copies, gallery[own])
        near = least_mse(_pool(copies), coarse) < distance[own].min() + 1e-5  # more than float32's rounding
        near[own] = False
        distance[near] = least_mse(copies, gallery[near])
        return distance

    def _verdict(self, distance: Tensor, image: Tensor, name: str, background: str | None) -> Verdict:
        best = int(distance.argmin())
        own = distance[self._rows_of[name]].min()
        rank = int((distance < own - 1e-6).sum())  # identical images tie up to float32 rounding
        row = self.index[best]
        return Verdict(
            name=name,
            background=background,
            rank=rank,
            nearest=row.name,
            nearest_style=row.style,
            mse=float(distance[best]),
            background_seen=background_of(image),
        )


def least_mse(copies: Tensor, gallery: Tensor) -> Tensor:
    """Return the minimum mean squared error of copies (K, C, h, w) to each image (N, C, h, w), shape (N,)."""
    copies, gallery = copies.flatten(1), gallery.flatten(1)
    # |a − b|² = |a|² − 2ab + |b|², (N, K)
    products = torch.addmm(copies.square().sum(1).expand(len(gallery), -1), gallery, copies.T, alpha=-2)
    return (products.amin(1) + gallery.square().sum(1)).clamp_min(0) / gallery.shape[1]


def _pool(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 4)


def shifted_and_scaled(image: Tensor) -> Tensor:
    """Return the shifted and scaled copies of an image (3, H, W) minus its background, (5·7·7, 3, 64, 64).

    Uncovered areas are 0.
    """
    resized = F.interpolate(
        image[None], size=(SIZE, SIZE), mode="area" if image.shape[-1] >= SIZE else "bilinear"
    )
    copies = []
    for scale in SCALES:
        theta = torch.tensor([[[1 / scale, 0, 0], [0, 1 / scale, 0]]])
        scaled = (
            F.grid_sample(
                resized, F.affine_grid(theta, list(resized.shape), align_corners=False), align_corners=False
            )
            if scale != 1
            else resized
        )
        padded = F.pad(scaled, (SHIFT,) * 4)
        windows = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # (1, 3, 7, 7, 64, 64)
        copies.append(windows[0].flatten(1, 2).transpose(0, 1))
    return torch.cat(copies)


def background_of(image: Tensor) -> str:
    """Return the palette's colour nearest to the median of the corners of an image (3, H, W) in [0, 1].

    Each corner is a square with a side of 1/32 of the width.
    """
    patch = max(1, image.shape[-1] // 32)
    ends = [slice(0, patch), slice(-patch, None)]
    corners = torch.cat(
        [image[:, rows, columns].flatten(1) for rows in ends for columns in ends], dim=1
    ).float()  # (3, pixels)
    median = corners.quantile(0.5, dim=1)
    return min(PALETTE, key=lambda name: float((median - _colour(name).flatten()).square().sum()))


def _colour(background: str | None) -> Tensor:
    return torch.tensor(PALETTE[background or "white"], dtype=torch.float32).view(3, 1, 1) / 255
