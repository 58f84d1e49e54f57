"""What a recipe states of the arguments of a task, so that the task can be run again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ldm.images.result import Images
from ldm.support.scalars import python_scalar, python_scalars
from ldm.weights.formats.safetensors import sha256

Task = TypeVar("Task", bound=Callable[..., Images])
# Tasks of which the options in the recipe say all; the recipes of other tasks hold their arguments.
BY_OPTIONS = ("text_to_image", "class_to_image", "unconditional")
FILE_ARGUMENTS = (
    "image",
    "mask",
    "depth",
)  # arguments that are paths if they are texts; of others only a `Path` is
SETTLED = ("convention", "grid", "sizes")  # options that the recipe holds already, as plain mappings
ENTRY = {"path", "sha256"}  # keys of a file in a recipe


class InMemory(Exception):
    """An argument that a recipe cannot hold."""


def replayable(task: Task) -> Task:
    """Make a task a method whose recipe holds its arguments, so that `ldm replay` can run it again.

    Files are held by path and SHA-256. If an argument is an image in memory, a tensor or a function, the
    recipe is not replayable, and states the reason as "because".
    """
    signature = inspect.signature(task)
    pipe = next(iter(signature.parameters))

    @functools.wraps(task)
    def run(self: Any, *args: Any, **options: Any) -> Images:
        args, options = tuple(map(python_scalar, args)), python_scalars(options)
        given = dict(signature.bind(self, *args, **options).arguments)
        given.update(given.pop("options", {}))
        known: dict[str, Any] = {}
        try:
            known["arguments"] = {
                name: as_json(name, value)
                for name, value in given.items()
                if name not in (pipe, "progress", *SETTLED)
            }
        except InMemory as reason:
            known["because"] = str(reason)
        images = task(self, *args, **options)
        if "arguments" in images.recipe or "because" in images.recipe:
            return images  # the recipe of another task, which this one is a case of
        if "arguments" in known:
            known["arguments"] |= {
                name: images.recipe[name] for name in SETTLED if given.get(name) is not None
            }
        return replace(images, recipe={**images.recipe, **known, "replayable": "arguments" in known})

    run.replayable = True  # type: ignore[attr-defined]  # marks what `ldm replay` may call by name
    return cast(Task, run)


def as_json(name: str, value: Any) -> Any:
    """Return an argument as JSON can hold it.

    Args:
        name: Name of the argument.
        value: Its value.

    Raises:
        InMemory: If JSON cannot hold it.
    """
    if isinstance(value, Path) or (name in FILE_ARGUMENTS and isinstance(value, str)):
        # a file that is absent is reported by the task
        return {"path": str(value), "sha256": sha256(value)} if Path(value).is_file() else None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(name, part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [as_json(name, part) for part in value]
    raise InMemory(
        f"its {name} was given as {type(value).__name__}, which a recipe does not hold: give images as files"
    )


def from_json(name: str, value: Any) -> Any:
    """Return the argument that a recipe holds.

    Args:
        name: Name of the argument, for messages.
        value: Its value in the recipe.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file has changed.
    """
    if isinstance(value, list):
        return [from_json(name, part) for part in value]
    if not isinstance(value, Mapping) or set(value) != ENTRY:
        return value
    path = Path(value["path"])
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: no such file: {str(path)!r}, which the image was made of (a relative path counts from"
            " the current folder)"
        )
    if (now := sha256(path)) != value["sha256"]:
        raise ValueError(
            f"{name}: {str(path)!r} is not the file that the image was made of"
            f" (sha256 {value['sha256']}, here {now})"
        )
    return path
