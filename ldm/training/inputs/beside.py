"""What inpainting and depth models read beside the noised latent, made of the training images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.framing import crop_to_frame
from ldm.images.canvas import Canvas
from ldm.images.pixels import array_values, to_depth
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.tasks.border import HOLES
from ldm.support.text import shown
from ldm.training.draws import Draws
from ldm.training.inputs.files import FileImages, files_only
from ldm.training.inputs.protocol import Samples, TrainingImages
from ldm.training.inputs.reading import ImageSample

HOLE = 4  # use of a sample's generators; see `Draws.of_sample`
WHOLE = 0.25  # share of holes that are the whole image, as Stable Diffusion's inpainting model was trained
LACKING: Mapping[str, str] = {  # by `ldm.catalog.cards.Concat`
    "image": "the image before an edit",
    "lowres": "the small image to enlarge",
    "lowres-noised": "the small image to enlarge",
}


class Beside(Protocol):
    """Makes the channels that are joined to x_t."""

    def __call__(self, pipe: LatentDiffusion, samples: Samples, seeds: Sequence[int]) -> Tensor:
        """Return the channels (B, C', h, w) of B samples of one size, on the pipeline's device.

        Args:
            pipe: The model.
            samples: The samples.
            seeds: A number for each sample, by which its hole is drawn.
        """


class FilesBeside:
    """A folder with a file for each training image, under the same path, or the same path and .png.

    Args:
        folder: The folder.
        images: The training images.
        key: Key of the configuration that names the folder, for messages.

    Raises:
        FileNotFoundError: If a training image has no such file; the message names it.
    """

    def __init__(self, folder: str, images: TrainingImages, key: str) -> None:
        self.folder, self.key, self.files = Path(folder), key, files_only(images, key).files
        for item in (*self.files.train.tolist(), *self.files.held.tolist()):
            self.path(item)

    def path(self, item: int) -> Path:
        """Return the file of an image by its number in the data set."""
        same = self.folder / self.files.dataset.record(item).name
        found = next((path for path in (same, same.with_suffix(".png")) if path.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{self.key}: {shown(str(same))} is absent, and so is {same.stem}.png")
        return found


class Holes:
    """Images with a hole as the model's inpainting reads them (`ldm.pipelines.tasks.border.HOLES`).

    Args:
        images: The training images.
        seed: Seed of the run; a hole depends on it and on the number of its sample.
    """

    def __init__(self, images: TrainingImages, seed: int) -> None:
        self.images, self.draws = images, Draws(seed, range(0))

    @torch.no_grad()
    def __call__(self, pipe: LatentDiffusion, samples: Samples, seeds: Sequence[int]) -> Tensor:
        """Return mask and latent of the images with holes; see `Beside`."""
        pixels = self.images.tensor(samples).to(pipe.device) / 2 + 0.5  # (B, 3, H, W)
        height, width = pixels.shape[-2:]
        holes = [draw_hole(self.draws.of_sample(seed, HOLE), height, width) for seed in seeds]
        hole = torch.from_numpy(np.stack(holes))[:, None].to(pixels)  # (B, 1, H, W)
        canvas = Canvas(pixels=pixels, hole=hole, frame=(height, width))
        channels, _ = HOLES[pipe.card.concat](pipe.stage, canvas, 1.0)
        assert channels is not None
        return channels


def draw_hole(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a hole: the whole image, one to four boxes, or one to four strokes of a thick brush.

    The kinds are those of LaMa (Suvorov et al. 2021, arXiv:2109.07161, section 2.3), which Stable Diffusion's
    inpainting model was trained with, and the whole image in `WHOLE` of the cases.

    Args:
        rng: Generator of random numbers.
        height: Height of the image in pixels.
        width: Its width in pixels.

    Returns:
        (height, width) float32: 1 where the image is unknown, at least somewhere, and 0 elsewhere.
    """
    from PIL import Image, ImageDraw

    kind = rng.random()
    if kind < WHOLE:
        return np.ones((height, width), dtype=np.float32)
    image = Image.new("1", (width, height))
    pen, size = ImageDraw.Draw(image), np.array([width, height])
    for _ in range(rng.integers(1, 5)):
        if kind < (1 + WHOLE) / 2:
            extent = rng.uniform(0.1, 0.6, 2) * size
            corner = rng.uniform(0, 1, 2) * (size - extent)
            pen.rectangle([*corner.tolist(), *(corner + extent).tolist()], fill=1)
            continue
        points = (rng.uniform(0, 1, (rng.integers(2, 7), 2)) * (size - 1)).tolist()
        brush = max(1.0, rng.uniform(0.05, 0.25) * min(height, width))
        pen.line([tuple(point) for point in points], fill=1, width=round(brush))
        for x, y in points:
            pen.ellipse([x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2], fill=1)
    return np.asarray(image, dtype=np.float32)


class DepthMaps:
    """Depth maps from files, in the frames of their images.

    Args:
        folder: The folder; see `FilesBeside`.
        images: The training images.
    """

    def __init__(self, folder: str, images: TrainingImages) -> None:
        self.files = FilesBeside(folder, images, "data.depth")

    def __call__(self, pipe: LatentDiffusion, samples: Samples, seeds: Sequence[int]) -> Tensor:
        """Return the depth (B, 1, h, w) in [−1, 1], each normalized to its own range; see `Beside`."""
        factor = pipe.stage.images.factor
        maps = [self.read(sample) for sample in samples]
        size = [side // factor for side in maps[0].shape[-2:]]
        return to_depth(torch.stack(maps), size).to(pipe.device)

    def read(self, sample: ImageSample) -> Tensor:
        """Return the depth map of a sample, (1, H, W) float32, in its own unit."""
        from PIL import Image

        path = self.files.path(sample.item)
        values = array_values(path, "depth").float()
        if values.ndim == 3 and bool((values == values[..., :1]).all()):
            values = values[..., 0]
        if values.ndim != 2:
            raise ValueError(f"data.depth: {shown(str(path))}: expected one channel, got {values.shape[-1]}")
        return torch.from_numpy(crop_to_frame(Image.fromarray(values.numpy()), sample.frame).copy())[None]


def depth_maps(images: FileImages) -> DepthMaps:
    """Return the depth maps of training images; ValueError if their configuration names none."""
    if images.config.depth is None:
        raise ValueError(
            "data.depth: expected a folder with a depth map for each image, as the model reads one"
        )
    return DepthMaps(images.config.depth, images)


def channels_beside(pipe: LatentDiffusion, images: TrainingImages, seed: int) -> Beside | None:
    """Return what makes the channels that a model reads beside x_t; None if it reads none.

    Args:
        pipe: The model.
        images: The training images.
        seed: Seed of the run.

    Raises:
        ValueError: If the images lack what it reads; the message names it.
        FileNotFoundError: If a depth map is absent.
    """
    concat = pipe.card.concat
    makers: Mapping[str, Callable[[], Beside]] = {
        "inpaint": lambda: Holes(images, seed),
        "inpaint-ldm": lambda: Holes(images, seed),
        "depth": lambda: depth_maps(files_only(images, f"{pipe.name!r}, which reads depth maps")),
    }
    return None if concat is None else makers[concat]()
