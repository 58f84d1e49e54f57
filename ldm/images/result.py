"""`Images`: what every task returns."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.images.files import check_quality, check_writable, write_image
from ldm.images.sheets import arrange, to_bytes, with_caption
from ldm.support.files import write_atomically
from ldm.support.scalars import check_within, finite_number

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LONGEST_FRAME = 600  # seconds of a GIF, which holds 16 bits of hundredths


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Generated images with their seeds and the recipe that reproduces them.

    Args:
        tensor: The images, shape (B, 3, H, W), float32 in [0, 1].
        seeds: The seed of each image, length B.
        prompts: The prompt of each image, length B.
        recipe: Every option of the call, the SHA-256 of the weights and the software versions, as JSON can
            hold it. `save` writes it into the file; `ldm replay FILE` repeats the call. Default: empty.
        flagged: The safety checker's verdict on each image, length B; None without a checker. Default: None.
        steps: The denoised prediction of each sampling step, shape (N, B, 3, H, W) in [0, 1]; None unless
            the call had `keep_steps=True`. Default: None.

    Raises:
        ValueError: If shapes or lengths differ, or a value is NaN or infinite.
    """

    tensor: Tensor
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    flagged: tuple[bool, ...] | None = None
    steps: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tensor.ndim != 4 or self.tensor.shape[1] != 3:
            raise ValueError(f"tensor has shape {tuple(self.tensor.shape)}, expected (B, 3, H, W)")
        b = len(self.tensor)
        if not b == len(self.seeds) == len(self.prompts):
            raise ValueError(f"{b} images with {len(self.seeds)} seeds and {len(self.prompts)} prompts")
        if self.flagged is not None and len(self.flagged) != b:
            raise ValueError(f"{b} images with {len(self.flagged)} verdicts of the safety checker")
        if self.steps is not None and (self.steps.ndim != 5 or self.steps.shape[1:] != self.tensor.shape):
            expected = ", ".join(map(str, self.tensor.shape))
            raise ValueError(f"steps have shape {tuple(self.steps.shape)}, expected (N, {expected})")
        if not torch.isfinite(self.tensor).all():
            raise ValueError("an image has NaN or infinite values: the model overflowed; try dtype='float32'")

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Image]:
        return iter(self.pil())

    def pil(self) -> list[Image]:
        """Return the images as PIL images, 8 bits per channel, rounded to nearest."""
        from PIL import Image

        return [Image.fromarray(pixels) for pixels in to_bytes(self.tensor)]

    def numpy(self) -> np.ndarray:
        """Return the images as a uint8 array (B, H, W, 3), rounded to nearest."""
        return to_bytes(self.tensor)

    def grid(self, columns: int | None = None) -> Image:
        """Return all images in one, row by row.

        Args:
            columns: Images per row. Default: None, a grid as close to square as possible.
        """
        return arrange(self.pil(), columns)

    def captioned(self, columns: int | None = None) -> Image:
        """Return the grid with prompt and seed below each image; prompts are cut after three lines.

        Args:
            columns: Images per row. Default: None, a grid as close to square as possible.
        """
        captions = zip(self.pil(), self.prompts, self.seeds, strict=True)
        return arrange([with_caption(*caption) for caption in captions], columns)

    def animate(
        self, path: str | Path, *, seconds: float = 0.12, hold: float = 1.5, columns: int | None = None
    ) -> Path:
        """Write a GIF of the denoising: the grid predicted at each step, then the images.

        Args:
            path: The file, with the suffix .gif. It is written whole or not at all.
            seconds: Duration of each step, 0.02 (viewers ignore shorter ones) to 600. Default: 0.12.
            hold: Duration of the last frame in seconds, 0.02 to 600. Default: 1.5.
            columns: Images per row. Default: None, a grid as close to square as possible.

        Returns:
            The path.

        Raises:
            ValueError: If the steps were not kept, or for another suffix or a duration out of range.
            OSError: If the file cannot be written.
        """
        if self.steps is None:
            raise ValueError("no steps to animate: generate the images with keep_steps=True")
        for name, duration in (("seconds", seconds), ("hold", hold)):
            check_within(name, finite_number(name, duration), 0.02, LONGEST_FRAME)
        path, buffer = check_writable(path, (".gif",)), io.BytesIO()
        frames = [replace(self, tensor=step, steps=None).grid(columns) for step in (*self.steps, self.tensor)]
        frames[0].save(
            buffer,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=[round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)],
            loop=0,
            disposal=2,  # frames do not depend on the last one, so none is dropped where two are equal
        )
        write_atomically(path, buffer.getvalue())
        return path

    def save(self, path: str | Path, *, separate: bool = False, quality: int | None = None) -> list[Path]:
        """Write the images to a file with the recipe in its metadata: one file, as a grid if B > 1.

        PNG is lossless: `ldm replay` reproduces its pixels exactly. JPEG (without chroma subsampling) and
        WebP are lossy: a replay reproduces the pixels before compression.

        Args:
            path: The file, with the suffix .png, .jpg, .jpeg or .webp. Each file is written whole or not at
                all.
            separate: Write NAME-SEED.SUFFIX for each image instead of a grid. Default: False.
            quality: Quality of JPEG and WebP, from 1 to 100. Default: None, 95.

        Returns:
            The paths written.

        Raises:
            ValueError: For another suffix, a quality out of range, a quality for a PNG, or an image with more
                pixels on a side than the format can hold.
            OSError: If a file cannot be written.
        """
        path = Path(path)
        check_quality(path, quality)
        if not separate or len(self) == 1:
            image = self.grid()
            write_image(path, image, with_pixels(self.recipe, image), quality=quality)
            return [path]
        paths = [path.with_name(f"{path.stem}-{seed}{path.suffix}") for seed in self.seeds]
        if len(set(paths)) != len(paths):
            paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self))]
        for target in paths:  # before the first is written
            check_writable(target)
        for i, (target, image) in enumerate(zip(paths, self.pil(), strict=True)):
            recipe = with_pixels({**self.recipe, "index": i}, image)
            write_image(target, image, recipe, quality=quality)
        return paths

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.captioned().save(buffer, format="PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        b, _, h, w = self.tensor.shape
        flagged = f", {sum(self.flagged)} flagged by the safety checker" if self.flagged is not None else ""
        prompts = list(dict.fromkeys(self.prompts))
        return f"Images({b} of {w}×{h}, seeds {list(self.seeds)}, prompts {prompts}{flagged})"


def with_pixels(recipe: Mapping[str, Any], image: Image) -> Mapping[str, Any]:
    """Return a recipe that names the pixels of its image by their SHA-256, if it can be replayed."""
    return {**recipe, "pixels": pixel_sha256(image)} if recipe.get("replayable") else recipe


def pixel_sha256(image: Image) -> str:
    """Return the SHA-256 of an 8-bit RGB image: of its width, its height and its pixels."""
    return hashlib.sha256(f"{image.width} {image.height} ".encode() + image.tobytes()).hexdigest()
