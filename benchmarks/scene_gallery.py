"""The images of a data set as templates: what each adds to a background, at several sizes.

A template is an image composed on a background minus the background, on values in [0, 1]: `alpha·(image −
background)`. It is 0 where the image is transparent.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import PALETTE, EmojiData, recolour

SMALL, COARSE = 36, 12  # sides of the templates that are kept


class SceneGallery:
    """Templates of all images of a data set, in their own colours or recoloured."""

    def __init__(self, data: EmojiData) -> None:
        self.index, self.images = data.index, data.images
        parts = [_premultiplied(data.images[i : i + 256], SMALL) for i in range(0, len(data.images), 256)]
        self._small = torch.cat([(part * 255).round().to(torch.uint8) for part in parts])  # (N, 4, 36, 36)
        self._coarse = functools.cache(self._make_coarse)

    def small(self, rows: Sequence[int], colour: str | None, background: str) -> Tensor:
        """Return templates at 36×36, (n, 3, 36, 36); the recolouring is that of the averaged pixels."""
        return on_background(self._recoloured(self._small[list(rows)], colour), background)

    def large(self, rows: Sequence[int], colour: str | None, background: str, side: int = 64) -> Tensor:
        """Return templates made from the whole images, (n, 3, side, side)."""
        images = self.images[list(rows)]
        return on_background(
            _premultiplied(images if colour is None else recolour(images, colour), side), background
        )

    def coarse_gains(self, shown: Tensor, sides: Tensor, colour: str | None, background: str) -> Tensor:
        """Return the gains of all images at 12×12 where frames show `shown`; see `scene_search.gains`.

        Args:
            shown: (K, 3, 12, 12).
            sides: Sides of the frames, (K,).
            colour: The colour of the images, or None for their own.
            background: The colour that they are composed on.

        Returns:
            (K, N).
        """
        matrix, squares = self._coarse(colour)
        against = rgb(background)
        # ⟨shown, alpha·(image − background)⟩, with the columns of alpha last in the matrix
        weights = torch.cat([shown, -torch.einsum("kchw,c->khw", shown, against)[:, None]], 1).flatten(1)
        energies = squares @ torch.cat([torch.ones(1), -2 * against, against.square().sum()[None]])
        return (2 * (weights @ matrix.T) - energies) * (sides.square() / COARSE**2)[:, None]

    def _make_coarse(self, colour: str | None) -> tuple[Tensor, Tensor]:
        """Return all premultiplied images at 12×12 as rows, (N, 576), and their sums of products, (N, 5).

        The products are |image|², those of each colour with alpha (3), and alpha².
        """
        parts = (self._recoloured(part, colour) for part in self._small.split(512))
        coarse = torch.cat([F.avg_pool2d(part, SMALL // COARSE) for part in parts])  # (N, 4, 12, 12)
        colours, alpha = coarse[:, :3], coarse[:, 3:]
        products = [colours.square().sum((1, 2, 3))[:, None], (colours * alpha).sum((2, 3))]
        return coarse.flatten(1), torch.cat([*products, alpha.square().sum((2, 3))], 1)

    @staticmethod
    def _recoloured(small: Tensor, colour: str | None) -> Tensor:
        """Return premultiplied images (n, 4, P, P) uint8 in a colour, as values in [0, 1]."""
        values = small.float() / 255
        if colour is None:
            return values
        alpha = values[:, 3:]
        straight = (values[:, :3] / alpha.clamp_min(1 / 255)).clamp(0, 1).movedim(1, -1)
        shaded = recolour((straight * 255).round().to(torch.uint8).numpy(), colour)
        return torch.cat([torch.from_numpy(shaded).movedim(-1, 1).float() / 255 * alpha, alpha], dim=1)


def on_background(premultiplied: Tensor, background: str) -> Tensor:
    """Return the templates (n, 3, P, P) of images with colours times alpha and alpha, (n, 4, P, P)."""
    return premultiplied[:, :3] - rgb(background).view(3, 1, 1) * premultiplied[:, 3:]


def rgb(colour: str) -> Tensor:
    """Return a colour of the palette, (3,) in [0, 1]."""
    return torch.tensor(PALETTE[colour], dtype=torch.float32) / 255


def _premultiplied(images: np.ndarray, side: int) -> Tensor:
    """Return images (n, P, P, 4) uint8 with colours times alpha at a side, (n, 4, side, side) in [0, 1]."""
    rgba = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    return F.interpolate(rgba, size=(side, side), mode="area" if rgba.shape[-1] >= side else "bilinear")
