"""What every task returns: pictures, the seeds they came from, and the recipe that makes them again."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.images.files import _write_png, _write_whole, check_writable
from ldm.images.sheets import captioned, sheet_of, to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Pictures and where they come from.

    ``tensor`` (B, 3, H, W) float32 in [0, 1]; ``seeds`` and ``prompts`` one for each picture; ``recipe``
    every option of the call, with the hashes of the weights and the versions of the software, as JSON can
    hold it. ``flagged``: what the safety checker said of each picture, None where there was none. ``steps``
    (N, B, 3, H, W): what each step of the sampler took the pictures to be, where a call was asked to keep
    them.
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
        if not len(self.tensor) == len(self.seeds) == len(self.prompts):
            raise ValueError(
                f"{len(self.tensor)} pictures with {len(self.seeds)} seeds and {len(self.prompts)} prompts"
            )
        if self.flagged is not None and len(self.flagged) != len(self.tensor):
            raise ValueError(
                f"{len(self.tensor)} pictures with {len(self.flagged)} verdicts of the safety checker"
            )
        if self.steps is not None and (self.steps.ndim != 5 or self.steps.shape[1:] != self.tensor.shape):
            raise ValueError(
                f"steps have shape {tuple(self.steps.shape)}, expected (N,"
                f" {', '.join(map(str, self.tensor.shape))})"
            )
        if not torch.isfinite(self.tensor).all():
            raise ValueError("a picture holds NaN or infinity: the model overflowed; try dtype='float32'")

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Image]:
        return iter(self.pil())

    def pil(self) -> list[Image]:
        """The pictures as PIL images, 8 bits a channel, rounded to nearest."""
        from PIL import Image

        return [Image.fromarray(picture) for picture in to_bytes(self.tensor)]

    def numpy(self) -> Any:
        """The pictures as (B, H, W, 3) uint8."""
        return to_bytes(self.tensor)

    def grid(self, columns: int | None = None) -> Image:
        """All pictures in one, row by row, as near to a square as it goes unless ``columns`` is given."""
        return sheet_of(self.pil(), columns)

    def captioned(self, columns: int | None = None) -> Image:
        """The grid with prompt and seed under each picture; a prompt that needs more than three lines ends in
        "…"."""
        pictures = self.pil()
        return sheet_of(
            [captioned(*row) for row in zip(pictures, self.prompts, self.seeds, strict=True)], columns
        )

    def animate(
        self, path: str | Path, *, seconds: float = 0.12, hold: float = 1.5, columns: int | None = None
    ) -> Path:
        """Write a GIF of the denoising: the grid as each step took it to be, then the pictures; ``seconds`` a
        step, ``hold`` for the last frame.

        Returns the path. ValueError for pictures whose steps were not kept, a name that does not end in .gif,
        or times below 0.02 seconds, which viewers do not keep to; the file is whole or not there.
        """
        if self.steps is None:
            raise ValueError("these pictures have no steps to animate: make them with keep_steps=True")
        if not min(seconds, hold) >= 0.02:
            raise ValueError(f"seconds and hold: expected at least 0.02, got {seconds} and {hold}")
        path = check_writable(path, ".gif")
        frames = [replace(self, tensor=step, steps=None).grid(columns) for step in (*self.steps, self.tensor)]
        times = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
        # no frame is the difference from the last one, so that none is dropped where two are equal
        options = {
            "format": "GIF",
            "save_all": True,
            "append_images": frames[1:],
            "duration": times,
            "loop": 0,
            "disposal": 2,
        }
        _write_whole(path, lambda target: frames[0].save(target, **options))
        return path

    def save(self, path: str | Path, *, separate: bool = False) -> list[Path]:
        """Write a PNG with the recipe inside: one file (a grid where there are several), or NAME-SEED.png for
        each with ``separate``.

        Returns the paths. ValueError for a name that does not end in .png; the file is whole or not there.
        """
        path = Path(path)
        if not separate or len(self) == 1:
            _write_png(path, self.grid(), self.recipe)
            return [path]
        paths = [path.with_name(f"{path.stem}-{seed}{path.suffix}") for seed in self.seeds]
        if len(set(paths)) != len(paths):
            paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self))]
        for i, (target, picture) in enumerate(zip(paths, self.pil(), strict=True)):
            _write_png(target, picture, {**self.recipe, "index": i})
        return paths

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.captioned().save(buffer, format="PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        b, _, h, w = self.tensor.shape
        flagged = f", {sum(self.flagged)} flagged by the safety checker" if self.flagged is not None else ""
        return (
            f"Images({b} of {w}×{h}, seeds {list(self.seeds)}, prompts"
            f" {list(dict.fromkeys(self.prompts))}{flagged})"
        )
