"""What every task returns: pictures, the seeds they came from, and the recipe that makes them again."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE_KEY = "ldm"  # the PNG text chunk that holds the recipe, as JSON


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Pictures and where they come from.

    ``tensor`` (B, 3, H, W) float32 in [0, 1]; ``seeds`` and ``prompts`` one for each picture; ``recipe`` every option of the call, with the
    hashes of the weights and the versions of the software, as JSON can hold it. ``flagged``: what the safety checker said of each picture, None
    where there was none.
    """

    tensor: Tensor
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    flagged: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.tensor.ndim != 4 or self.tensor.shape[1] != 3:
            raise ValueError(f"tensor has shape {tuple(self.tensor.shape)}, expected (B, 3, H, W)")
        if not len(self.tensor) == len(self.seeds) == len(self.prompts):
            raise ValueError(f"{len(self.tensor)} pictures with {len(self.seeds)} seeds and {len(self.prompts)} prompts")
        if self.flagged is not None and len(self.flagged) != len(self.tensor):
            raise ValueError(f"{len(self.tensor)} pictures with {len(self.flagged)} verdicts of the safety checker")
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
        from PIL import Image

        pictures = self.pil()
        columns = columns or -(-len(pictures) // max(1, round(len(pictures) ** 0.5)))
        if columns < 1:
            raise ValueError(f"columns: expected at least 1, got {columns}")
        w, h = pictures[0].size
        sheet = Image.new("RGB", (w * min(columns, len(pictures)), h * -(-len(pictures) // columns)), "white")
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (w * (i % columns), h * (i // columns)))
        return sheet

    def save(self, path: str | Path, *, separate: bool = False) -> list[Path]:
        """Write a PNG with the recipe inside: one file (a grid where there are several), or NAME-SEED.png for each with ``separate``.

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
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        b, _, h, w = self.tensor.shape
        flagged = f", {sum(self.flagged)} flagged by the safety checker" if self.flagged is not None else ""
        return f"Images({b} of {w}×{h}, seeds {list(self.seeds)}, prompts {list(dict.fromkeys(self.prompts))}{flagged})"


def to_bytes(tensor: Tensor) -> Any:
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8, rounded to nearest."""
    return (tensor.detach().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def check_writable(path: str | Path) -> Path:
    """The path, if a PNG can be written there: found out before any work; ValueError or an OSError that names it otherwise."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{str(path)!r}: pictures are written as PNG, expected a name that ends in .png")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, expected a file name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{str(path)!r} cannot be written")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(f"{str(path)!r} cannot be written: {error.strerror}") from None
    return path


def _write_png(path: Path, image: Image, recipe: Mapping[str, Any]) -> None:
    from PIL.PngImagePlugin import PngInfo

    check_writable(path)
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, json.dumps(recipe, ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe inside a PNG; FileNotFoundError, or ValueError if the file is no picture or has none."""
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(RECIPE_KEY)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{str(path)!r} is not a picture that can be read: {error}") from None
    if text is None:
        raise ValueError(f"{str(path)!r} has no recipe inside: it was not made by ldm, or its metadata was removed")
    try:
        recipe = json.loads(text)
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe in {str(path)!r} cannot be read: it is no JSON mapping")
    return recipe


def check_seeds(seed: int | Sequence[int], n: int) -> tuple[int, ...]:
    """n seeds: seed, seed + 1, … for a number; as given for a sequence of n. ValueError if they do not fit."""
    if isinstance(seed, int):
        if not 0 <= seed <= 2**63 - n:
            raise ValueError(f"seed: expected 0 to 2**63 - {n}, got {seed}")
        return tuple(range(seed, seed + n))
    seeds = tuple(int(s) for s in seed)
    if len(seeds) != n:
        raise ValueError(f"seed: {len(seeds)} seeds for {n} pictures")
    return seeds
