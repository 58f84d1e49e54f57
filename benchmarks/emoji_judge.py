"""The judge of emoji models: which of the data set's pictures an image is nearest to, and what colour its
ground has.

A plain rule instead of a network: mean squared error against every picture of the data set composed on the
ground that was asked for, at 64×64, the least over shifts of the image by up to ±3 pixels and scalings by 0.9
to 1.1. What a shift or a scaling uncovers is filled with that ground's colour.
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
    """What the judge says of one image that was to show ``name`` on ``ground`` (None: white).

    ``rank``: how many pictures are nearer to the image than the nearest one of that name (any style); 0 is a
    hit, below 5 in the top five. ``nearest``, ``nearest_style``, ``mse``: the nearest picture of all, and its
    mean squared error on [0, 1]. ``ground_seen``: the palette's colour nearest to the corners.
    """

    name: str
    ground: str | None
    rank: int
    nearest: str
    nearest_style: str
    mse: float
    ground_seen: str

    @property
    def ground_right(self) -> bool:
        return self.ground_seen == (self.ground or "white")


class EmojiJudge:
    """Judges images against all pictures of a data set, held-out ones too."""

    def __init__(self, data: EmojiData) -> None:
        self.index = data.index
        pictures = (
            torch.from_numpy(data.images[:])
            if data.images.flags.writeable
            else torch.from_numpy(data.images.copy())
        )
        colours, alphas = [], []
        for part in pictures.split(256):
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
    def __call__(self, images: Tensor, names: Sequence[str], grounds: Sequence[str | None]) -> list[Verdict]:
        """One verdict an image (B, 3, H, W) in [0, 1]; asked of each were a name ("red-apple") and a ground
        of the palette, or None."""
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) == len(names) == len(grounds):
            raise ValueError(
                f"expected (B, 3, H, W) with B names and grounds, got {tuple(images.shape)}, {len(names)} and"
                f" {len(grounds)}"
            )
        unknown = [name for name in names if name not in self._rows_of]
        if unknown:
            raise ValueError(f"names that the data set does not have: {unknown[:5]}")
        images = images.float()
        verdicts: dict[int, Verdict] = {}
        for ground in dict.fromkeys(grounds):
            gallery = self._gallery(ground)
            coarse = _pool(gallery)
            for i in (i for i, asked in enumerate(grounds) if asked == ground):
                distance = self._distances(images[i], names[i], ground, gallery, coarse)
                verdicts[i] = self._verdict(distance, images[i], names[i], ground)
        return [verdicts[i] for i in range(len(images))]

    def _gallery(self, ground: str | None) -> Tensor:
        """The pictures composed on a ground, less the ground: (N, 3, 64, 64). The differences stay, and
        float32 rounds less near zero."""
        return self._colour - _colour(ground) * self._alpha

    def _distances(
        self, image: Tensor, name: str, ground: str | None, gallery: Tensor, coarse: Tensor
    ) -> Tensor:
        """(N,) least mean squared error of an image's copies to each picture: exact up to the asked name's,
        infinite where surely larger.

        The error between box means is never above that between the images (Jensen), so that most pictures
        need no look at full size.
        """
        copies = shifted_and_scaled(image - _colour(ground))  # (K, 3, 64, 64)
        distance = torch.full((len(gallery),), torch.inf)
        own = torch.tensor(self._rows_of[name])
        distance[own] = least_mse(copies, gallery[own])
        near = least_mse(_pool(copies), coarse) < distance[own].min() + 1e-5  # more than float32's rounding
        near[own] = False
        distance[near] = least_mse(copies, gallery[near])
        return distance

    def _verdict(self, distance: Tensor, image: Tensor, name: str, ground: str | None) -> Verdict:
        best = int(distance.argmin())
        own = distance[self._rows_of[name]].min()
        rank = int((distance < own - 1e-6).sum())  # pictures drawn alike tie, float32's rounding aside
        row = self.index[best]
        return Verdict(
            name=name,
            ground=ground,
            rank=rank,
            nearest=row.name,
            nearest_style=row.style,
            mse=float(distance[best]),
            ground_seen=ground_of(image),
        )


def least_mse(copies: Tensor, gallery: Tensor) -> Tensor:
    """(N,) least mean squared error of copies (K, C, h, w) to each picture (N, C, h, w): |a − b|² = |a|² −
    2ab + |b|²."""
    copies, gallery = copies.flatten(1), gallery.flatten(1)
    # (N, K)
    products = torch.addmm(copies.square().sum(1).expand(len(gallery), -1), gallery, copies.T, alpha=-2)
    return (products.amin(1) + gallery.square().sum(1)).clamp_min(0) / gallery.shape[1]


def _pool(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 4)


def shifted_and_scaled(image: Tensor) -> Tensor:
    """All copies of an image (3, H, W), less its ground, that the judge compares: (5·7·7, 3, 64, 64), filled
    up with 0."""
    picture = F.interpolate(
        image[None], size=(SIZE, SIZE), mode="area" if image.shape[-1] >= SIZE else "bilinear"
    )
    copies = []
    for scale in SCALES:
        theta = torch.tensor([[[1 / scale, 0, 0], [0, 1 / scale, 0]]])
        scaled = (
            F.grid_sample(
                picture, F.affine_grid(theta, list(picture.shape), align_corners=False), align_corners=False
            )
            if scale != 1
            else picture
        )
        padded = F.pad(scaled, (SHIFT,) * 4)
        windows = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # (1, 3, 7, 7, 64, 64)
        copies.append(windows[0].flatten(1, 2).transpose(0, 1))
    return torch.cat(copies)


def ground_of(image: Tensor) -> str:
    """The palette's colour nearest to the median of the four corners (each a 32nd of the width) of an image
    (3, H, W) in [0, 1]."""
    patch = max(1, image.shape[-1] // 32)
    ends = [slice(0, patch), slice(-patch, None)]
    corners = torch.cat(
        [image[:, rows, columns].flatten(1) for rows in ends for columns in ends], dim=1
    ).float()  # (3, pixels)
    median = corners.quantile(0.5, dim=1)
    return min(PALETTE, key=lambda name: float((median - _colour(name).flatten()).square().sum()))


def _colour(ground: str | None) -> Tensor:
    return torch.tensor(PALETTE[ground or "white"], dtype=torch.float32).view(3, 1, 1) / 255
