"""The options in a recipe: their types, and the limits of what a recipe from elsewhere may ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.catalog.cards import Defaults
from ldm.images.opening import decode_image
from ldm.pipelines.control.control_use import StatedControl
from ldm.pipelines.replayable import FileEntry, from_json
from ldm.support.config import convert
from ldm.support.files import file_exists
from ldm.support.text import shown

Texts = str | tuple[str, ...]
_WHOLE = (
    *("n", "steps", "height", "width", "left", "right", "top", "bottom", "factor", "noise_level", "window"),
    *("resample", "jump", "feather", "tile", "candidates", "iterations", "prior_steps", "upsampler_steps"),
)
_NUMBERS = (
    *("guidance", "strength", "seam", "image_guidance", "cross", "within", "most", "eta", "prior_guidance"),
)
_NAMES = ("sampler", "spacing", "source", "target", "prior_sampler", "upsampler_sampler")
_SWITCHES = ("exact", "invert", "upsample", "keep_steps")
_OTHERS: dict[str, Any] = {
    "prompt": Texts | int | tuple[int, ...],
    "label": int | tuple[int, ...],
    "negative": Texts,
    "seed": int | tuple[int, ...],
    "convention": str | Mapping[str, Any],
    "grid": Mapping[str, tuple[float, ...]] | tuple[float, ...],
    "sizes": Mapping[str, Any],
    "emphasis": Mapping[str, float],
}
TYPES: dict[str, Any] = {
    **dict.fromkeys(_WHOLE, int),
    **dict.fromkeys(_NUMBERS, float),
    **dict.fromkeys(_NAMES, str),
    **dict.fromkeys(_SWITCHES, bool),
    **_OTHERS,
}
LONGEST_OPTION = 50  # characters of a name
SCALARS = str | bool | int | float
IN_MEMORY = ("on_step", "latents", "embedding", "prior_latents", "upsampler_latents", "codes", "pair")
_OTHER_STEPS = ("prior_steps", "upsampler_steps")


@dataclass(frozen=True, kw_only=True)
class ReplayLimits:
    """What a recipe may ask for.

    Args:
        images: Number of images.
        pixels: Pixels of an image, given or generated.
        steps: Sampling steps of each stage.
        text: Characters of a text.
        work: Images times steps times pixels.
        tiles: Tiles of an image, of the side that a network sees at a time.
        file: Bytes of an image file that is given.
    """

    images: int = 64
    pixels: int = 2048 * 2048
    steps: int = 1000
    text: int = 4000
    work: int = 2**28
    tiles: int = 1024
    file: int = 2**28


LIMITS = ReplayLimits()


def typed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a task, as a recipe holds them, with their types checked.

    Raises:
        ValueError: If an option has a type that a recipe does not hold, or a name that none has; the message
            names it.
    """
    found = dict[str, Any]()
    for name, held in options.items():
        if not name.isidentifier() or len(name) > LONGEST_OPTION:
            raise ValueError(f"arguments: expected names of options, got {shown(name)}")
        value = from_json(name, held)
        if value is None or isinstance(value, FileEntry):
            found[name] = value
        elif name == "controls":
            found[name] = list(convert(value, tuple[StatedControl, ...], name))
        elif name in IN_MEMORY:
            raise ValueError(f"{name}: a recipe does not hold it, got {shown(value)}")
        elif isinstance(value, list) and any(isinstance(each, FileEntry) for each in value):
            found[name] = list(convert(value, tuple[FileEntry, ...], name))
        elif isinstance(value, float) and math.isinf(value) and name not in TYPES:
            found[name] = value  # a bound of a sampler
        else:
            found[name] = convert(value, TYPES.get(name, SCALARS | tuple[SCALARS, ...]), name)
    return found


def check_limits(options: Mapping[str, Any], usual: Defaults, limits: ReplayLimits) -> None:
    """Raise ValueError if a recipe asks for more than the limits; the message names the option.

    Args:
        options: The options of the task, of the types of `typed_options`.
        usual: The card's values of the options that are left out.
        limits: The limits.
    """

    def check(name: str, value: int, most: int) -> None:
        if value > most:
            raise ValueError(
                f"{name}: the recipe asks for {shown(value)}, expected at most {most:,}: lift the limits"
                " (limits=False, or --no-limits) if you trust it"
            )

    for name, value in options.items():
        for text in _texts(value):
            check(f"{name}: characters", len(text), limits.text)
    counts = {name: len(value) for name, value in options.items() if isinstance(value, tuple)}
    prompts = max(counts.get("prompt", 1), counts.get("label", 1))
    each = max(options.get("n") or 1, 1) * max(options.get("candidates") or 1, 1)
    images = max(prompts * each, counts.get("seed", 1))
    check("n: images", images, limits.images)
    steps = _most_steps(options, usual)
    check("steps", steps, limits.steps)
    pixels = max(_sizes(options, usual, limits))
    check("size: pixels", pixels, limits.pixels)
    for name in ("window", "tile"):
        if side := options.get(name):
            check(f"{name}: tiles of an image", pixels // max(side, 1) ** 2, limits.tiles)
    repeats = max(options.get("resample") or 1, options.get("iterations") or 1, 1)
    check("images times steps times pixels", images * steps * repeats * pixels, limits.work)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (str(key) for key in value)
    elif isinstance(value, tuple):
        yield from (each for each in value if isinstance(each, str))


def _most_steps(options: Mapping[str, Any], usual: Defaults) -> int:
    """Return the number of steps of the longest stage; the card's counts where the recipe states none."""
    stated = max(options.get("steps") or 0, _length(options.get("grid") or ()))
    return max(stated or usual.steps, *(options.get(name) or 0 for name in _OTHER_STEPS))


def _length(grid: Any) -> int:
    return max(map(len, grid.values()), default=0) if isinstance(grid, Mapping) else len(grid)


def _sizes(options: Mapping[str, Any], usual: Defaults, limits: ReplayLimits) -> Iterator[int]:
    """Yield the number of pixels of each image that is read or generated."""
    yield (options.get("height") or usual.height) * (options.get("width") or usual.width)
    factor = max(options.get("factor") or 1, 1)
    sides = {side: max(options.get(side) or 0, 0) for side in ("left", "right", "top", "bottom")}
    for name, value in options.items():
        for entry in _files(value):
            w, h = image_size(name, Path(entry.path), limits)
            yield (w + sides["left"] + sides["right"]) * (h + sides["top"] + sides["bottom"]) * factor**2


def _files(value: Any) -> Iterator[FileEntry]:
    """Yield the files of an option."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, FileEntry):
            yield entry
        elif isinstance(entry, StatedControl):
            yield from entry.files


def image_size(name: str, path: Path, limits: ReplayLimits) -> tuple[int, int]:
    """Return the width and height of an image file, of which the header alone is read; (0, 0) if it is none.

    Args:
        name: Name of the argument, for messages.
        path: The file.
        limits: The limits.

    Raises:
        ValueError: If the file is larger than the limits allow.
    """
    if not file_exists(path):
        return 0, 0
    if (size := path.stat().st_size) > limits.file:
        raise ValueError(f"{name}: {shown(str(path))} has {size:,} bytes, expected at most {limits.file:,}")
    try:
        return decode_image(path, lambda image: image.size, name=name)
    except ValueError:  # the task says what is wrong with it
        return 0, 0
