"""The hints of training images, for the training of controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm.data.framing import crop_to_frame
from ldm.data.sources.decoding import on_background
from ldm.images.hints import canny, scribble, soft_edge, tile
from ldm.images.opening import decode_image
from ldm.images.pixels import convert_mode
from ldm.training.images import to_tensor
from ldm.training.inputs.beside import FilesBeside
from ldm.training.inputs.protocol import Samples, TrainingImages
from ldm.training.inputs.reading import ImageSample

HINT_MAKERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "canny": canny,
    "soft_edge": soft_edge,
    "scribble": scribble,
    "tile": tile,
}
BEHIND = (255, 255, 255)  # behind transparent pixels, as in `ldm.images.pixels.to_pixels`


@dataclass(frozen=True, kw_only=True)
class HintSource:
    """Where the hints of training images come from.

    Args:
        kind: A maker of `ldm.images.hints`, which makes them of the images, or "files". Default: "canny".
        folder: For "files", the folder that has for each image a hint with the same path, or the same path
            and the ending .png.
    """

    kind: Literal["canny", "soft_edge", "scribble", "tile", "files"] = "canny"
    folder: str | None = None

    def __post_init__(self) -> None:
        if (self.kind == "files") != (self.folder is not None):
            raise ValueError(
                f"hints: kind {self.kind!r} and folder {self.folder!r}: expected a folder for 'files' alone"
            )


class Hints:
    """The hints of training images, in their frames.

    Args:
        source: Where they come from.
        images: The training images.

    Raises:
        FileNotFoundError: If a training image has no file of a hint; the message names it.
    """

    def __init__(self, source: HintSource, images: TrainingImages) -> None:
        self.source, self.images = source, images
        self._files = None if source.folder is None else FilesBeside(source.folder, images, "hints.folder")

    def __call__(self, samples: Samples) -> Tensor:
        """Return the hints of B samples of one size, (B, 3, H, W) float32 in [0, 1]."""
        if self._files is not None:
            return torch.stack([self._read(sample) for sample in samples])
        return HINT_MAKERS[self.source.kind](self.images.tensor(samples) / 2 + 0.5)

    def key(self, sample: ImageSample) -> str:
        """Return a text that differs where the file of a hint differs; "" for hints that are made."""
        if self._files is None:
            return ""
        path = self._files.path(sample.item)
        state = path.stat()
        return f"/{path.name}/{state.st_size}/{state.st_mtime_ns}"

    def _read(self, sample: ImageSample) -> Tensor:
        assert self._files is not None
        image = decode_image(
            self._files.path(sample.item),
            lambda opened: on_background(convert_mode(opened, "image"), BEHIND),
            name="hint",
        )
        return to_tensor(np.stack([crop_to_frame(image, sample.frame)]))[0] / 2 + 0.5
