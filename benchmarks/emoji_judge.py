"""The judge of images of one thing: which images of the data set are nearest, and the background colour.

A fixed rule instead of a network, that of `scene_judge`: the images of the requested name are fitted to the
image over place, size and tilt, and there it is compared with all images of the data set, each at its own
best place, size and tilt. The background is taken as it is; whether it is the requested one is judged apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scene_fit import FINALISTS, SceneFit, seen_background, smooth
from scene_gallery import SceneGallery
from torch import Tensor

from ldm.data import EmojiData, Facts, Thing

SIZE = 128  # pixels of the side at which images are compared


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement of one image.

    Attributes:
        name: The requested name.
        background: The requested background colour; None is white.
        rank: How many images of other names are nearer than the nearest one of that name (any style), at most
            `scene_fit.FINALISTS`; 0 is a hit, below 5 is in the top five.
        nearest: The name of the nearest image; None if the image shows nothing.
        nearest_style: The style of the nearest image; None if the image shows nothing.
        error: The share of the energy of what is shown that the nearest image of the requested name leaves
            unexplained; 0 is a perfect match, and 1 if the image shows nothing.
        background_seen: The palette's colour nearest to the border.
    """

    name: str
    background: str | None
    rank: int
    nearest: str | None
    nearest_style: str | None
    error: float
    background_seen: str

    @property
    def background_right(self) -> bool:
        return self.background_seen == (self.background or "white")


class EmojiJudge:
    """Judge images against all images of a data set, including held-out ones."""

    def __init__(self, data: EmojiData) -> None:
        self.index, self.gallery = data.index, SceneGallery(data)

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, names: Sequence[str], backgrounds: Sequence[str | None]
    ) -> list[Verdict]:
        """Return one verdict per image.

        Args:
            images: Images, shape (B, 3, S, S), in [0, 1].
            names: The requested names, such as "red-apple".
            backgrounds: The requested background colours of the palette, or None for white.

        Raises:
            ValueError: If the shapes do not match or a name is not in the data set.
        """
        square = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
        if not square or not len(images) == len(names) == len(backgrounds):
            raise ValueError(
                f"expected (B, 3, S, S) with B names and backgrounds, got {tuple(images.shape)},"
                f" {len(names)} and {len(backgrounds)}"
            )
        unknown = [name for name in names if name not in self.index.rows_of]
        if unknown:
            raise ValueError(f"names that the data set does not have: {unknown[:5]}")
        return [
            self._verdict(resized(image.float()), name, background)
            for image, name, background in zip(images, names, backgrounds, strict=True)
        ]

    def _verdict(self, image: Tensor, name: str, background: str | None) -> Verdict:
        seen, level = seen_background(image)
        facts = Facts(things=(Thing(name=name),), background=seen)
        shown = smooth(image - level.view(3, 1, 1))
        parts = SceneFit(self.gallery, shown, seen, facts, hopeless=math.inf).parts
        nearest = self.index[parts[0].nearest] if parts else None
        return Verdict(
            name=name,
            background=background,
            rank=parts[0].rank if parts else FINALISTS,
            nearest=None if nearest is None else nearest.name,
            nearest_style=None if nearest is None else nearest.style,
            error=parts[0].error if parts else 1.0,
            background_seen=seen,
        )


def resized(image: Tensor) -> Tensor:
    """Return an image (3, S, S) at the size at which images are compared, (3, 128, 128)."""
    mode = "area" if image.shape[-1] >= SIZE else "bilinear"
    return F.interpolate(image[None], size=(SIZE, SIZE), mode=mode)[0]
