"""The exemplars of a pipeline, to which a user adds images of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.exemplar_library import OWN_STYLE
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.images.pixels import ImageInput, read_batch, with_channels

ADDED_EXEMPLARS = "exemplars added"
"""What recipes call the SHA-256 of the images that were added to the library after loading."""


class Exemplars:
    """The library of a pipeline.

    Args:
        text: The conditioner that reads the library.
        origin: Hashes of the pipeline's weights, which recipes state; the hash of what is added is entered.
    """

    def __init__(self, text: ExemplarConditioner, origin: dict[str, Any]) -> None:
        self.library = text.library
        self._text, self._origin = text, origin
        self._loaded = {exemplar.content for exemplar in self.library}

    @property
    def names(self) -> list[str]:
        """The names of the things, sorted."""
        return self.library.names

    @property
    def styles(self) -> list[str]:
        """The styles that any image has."""
        return self.library.styles

    @property
    def nouns(self) -> Mapping[str, tuple[str, ...]]:
        """The names that each noun phrase of a prompt may mean."""
        return self.library.nouns

    def __len__(self) -> int:
        return len(self.library)

    def chosen(self, prompt: str, seed: int = 0) -> list[tuple[str, str]]:
        """Return the name and the style of each image that is shown to the model for a prompt and a seed.

        Image i of a call of `text_to_image` has the seed `seed` + i. The style tells whose drawing it is.

        Args:
            prompt: One prompt. Of a blend, the images of each alternative follow each other.
            seed: The seed of the image. Default: 0.

        Raises:
            ValueError: If the images are not chosen by the seed, but by an image's embedding (unCLIP).
        """
        if self._text.index is not None:
            raise ValueError("the embedding of an image chooses the exemplars of this model, not the seed")
        return [(exemplar.name, exemplar.style) for exemplar in self._text.chosen(prompt, seed)]

    def add(self, name: str, image: ImageInput, *, style: str = OWN_STYLE, nouns: Iterable[str] = ()) -> None:
        """Add an image of a thing; prompts then draw it by its name, without training.

        Args:
            name: The name, such as "my robot".
            image: One image. Transparent pixels are not part of the thing; of an opaque image the whole
                rectangle is. An image that is not square is extended by transparent pixels, then resized.
            style: The style; an image of the same name and style is replaced. Default: "own".
            nouns: Other phrases that mean the thing, such as its plural "my robots". Default: none.

        Raises:
            ValueError: If the image cannot be read, there are several, or the name has no letters or digits.
            FileNotFoundError: If a path does not exist.
        """
        values = with_channels(read_batch(image, "image"), 4)  # (B, 4, H, W)
        if len(values) != 1:
            raise ValueError(f"image: expected one image, got {len(values)}")
        self.library.add(name, squared(values[0], self.library.size), style=style, nouns=nouns)
        self._note()

    def remove(self, name: str) -> None:
        """Remove all images of a name.

        Raises:
            ValueError: If there is none; the message offers the nearest name.
        """
        self.library.remove(name)
        self._note()

    def _note(self) -> None:
        """Enter the hash of the images that differ from those loaded into the origin of recipes."""
        added = [exemplar for exemplar in self.library if exemplar.content not in self._loaded]
        removed = len(self._loaded) - (len(self.library) - len(added))
        digest = hashlib.sha256(f"{removed}".encode())
        for exemplar in added:
            digest.update(f"\n{exemplar.name}\n{exemplar.style}\n".encode() + exemplar.content)
        self._origin.pop(ADDED_EXEMPLARS, None)
        if added or removed:
            self._origin[ADDED_EXEMPLARS] = digest.hexdigest()


def squared(image: Tensor, size: int) -> Tensor:
    """Return an image with opacity (4, H, W) as a square of `size` pixels, with transparent borders.

    It is resized with its colors multiplied by the opacity, so that hidden colors do not bleed.
    """
    _, h, w = image.shape
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    image = F.pad(image, (left, side - w - left, top, side - h - top))  # (4, side, side)
    if side == size:
        return image
    alpha = image[3:]
    resized = F.interpolate(
        torch.cat([image[:3] * alpha, alpha])[None],
        size=(size, size),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )[0].clamp(0, 1)
    return torch.cat([(resized[:3] / resized[3:].clamp_min(1e-4)).clamp(0, 1), resized[3:]])
