"""What every task returns: pictures, the seeds they came from, and the recipe that makes them again."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    where there was none. ``steps`` (N, B, 3, H, W): what each step of the sampler took the pictures to be, where a call was asked to keep them.
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
            raise ValueError(f"{len(self.tensor)} pictures with {len(self.seeds)} seeds and {len(self.prompts)} prompts")
        if self.flagged is not None and len(self.flagged) != len(self.tensor):
            raise ValueError(f"{len(self.tensor)} pictures with {len(self.flagged)} verdicts of the safety checker")
        if self.steps is not None and (self.steps.ndim != 5 or self.steps.shape[1:] != self.tensor.shape):
            raise ValueError(f"steps have shape {tuple(self.steps.shape)}, expected (N, {', '.join(map(str, self.tensor.shape))})")
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
        """The grid with prompt and seed under each picture; a prompt that needs more than three lines ends in "…"."""
        pictures = self.pil()
        return sheet_of([captioned(*row) for row in zip(pictures, self.prompts, self.seeds, strict=True)], columns)

    def animate(self, path: str | Path, *, seconds: float = 0.12, hold: float = 1.5, columns: int | None = None) -> Path:
        """Write a GIF of the denoising: the grid as each step took it to be, then the pictures; ``seconds`` a step, ``hold`` for the last frame.

        Returns the path. ValueError for pictures whose steps were not kept, a name that does not end in .gif, or times below 0.02 seconds, which
        viewers do not keep to; the file is whole or not there.
        """
        if self.steps is None:
            raise ValueError("these pictures have no steps to animate: make them with keep_steps=True")
        if not min(seconds, hold) >= 0.02:
            raise ValueError(f"seconds and hold: expected at least 0.02, got {seconds} and {hold}")
        path = check_writable(path, ".gif")
        frames = [replace(self, tensor=step, steps=None).grid(columns) for step in (*self.steps, self.tensor)]
        times = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
        # no frame is the difference from the last one, so that none is dropped where two are equal
        options = {"format": "GIF", "save_all": True, "append_images": frames[1:], "duration": times, "loop": 0, "disposal": 2}
        _write_whole(path, lambda target: frames[0].save(target, **options))
        return path

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
        self.captioned().save(buffer, format="PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        b, _, h, w = self.tensor.shape
        flagged = f", {sum(self.flagged)} flagged by the safety checker" if self.flagged is not None else ""
        return f"Images({b} of {w}×{h}, seeds {list(self.seeds)}, prompts {list(dict.fromkeys(self.prompts))}{flagged})"


CAPTION, LINES = 11, 3  # of a caption: the height of its letters in pixels, and the most lines of a prompt


def sheet_of(pictures: Sequence[Image], columns: int | None = None) -> Image:
    """Pictures of one width in one, row by row on white, as near to a square as it goes unless ``columns`` is given."""
    from PIL import Image

    columns = columns or -(-len(pictures) // max(1, round(len(pictures) ** 0.5)))
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    w, h = pictures[0].width, max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (w * min(columns, len(pictures)), h * -(-len(pictures) // columns)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (w * (i % columns), h * (i // columns)))
    return sheet


def captioned(picture: Image, prompt: str, seed: int) -> Image:
    """A picture with its prompt and seed below, at least 120 pixels wide."""
    from PIL import Image

    font = caption_font()
    width = max(picture.width, 120)
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width - 6:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1]} …"]
    return _below(Image, font, picture, width, [*lines, f"seed {seed}"])


@functools.cache
def caption_font() -> Any:
    """DejaVu Sans, which has most alphabets, where matplotlib is installed, which brings it; else the small font of PIL."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")  # finds the folder and imports nothing
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), CAPTION)
    return ImageFont.load_default(CAPTION)


def _below(image: Any, font: Any, picture: Image, width: int, lines: Sequence[str]) -> Image:
    from PIL import ImageDraw

    step = CAPTION + 3
    out = image.new("RGB", (width, picture.height + step * len(lines) + 8), "white")
    out.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        while len(line) > 1 and font.getlength(line) > width - 4:  # one word wider than the picture
            line = f"{line.rstrip('…')[:-1]}…"
        draw.text((width / 2, picture.height + 2 + step * i), line, fill="black" if i < len(lines) - 1 else "gray", font=font, anchor="ma")
    return out


def to_bytes(tensor: Tensor) -> Any:
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8, rounded to nearest."""
    return (tensor.detach().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def check_writable(path: str | Path, suffix: str = ".png") -> Path:
    """The path, if a PNG (or GIF) can be written there: found out before any work; ValueError or an OSError that names it otherwise."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{str(path)!r}: {suffix[1:].upper()} is written, expected a name that ends in {suffix}")
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
    _write_whole(path, lambda target: image.save(target, format="PNG", pnginfo=info))


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
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
