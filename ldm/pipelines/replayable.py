"""What a recipe says of the pictures that a task was given: files by path and SHA-256, so that the task can
be run again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ldm.images.result import Images
from ldm.weights.formats.safetensors import sha256

Task = TypeVar("Task", bound=Callable[..., Images])
PICTURES = ("image", "mask", "depth")  # arguments of which a text is a path; of all others a `Path` is
# options of types of their own, which the recipe holds as plain mappings already
SETTLED = ("convention", "grid", "sizes")
ENTRY = {"path", "sha256"}


class InMemory(Exception):
    """An argument that a recipe cannot hold."""


def replayable(task: Task) -> Task:
    """A task whose recipe holds what it was called with as "arguments", each file as its path, as given, and
    SHA-256: `ldm.replay` reads it again.

    Where an argument is a picture in memory, a tensor or a function, the recipe is not replayable, and says
    "because" of what.
    """
    signature = inspect.signature(task)

    @functools.wraps(task)
    def run(self: Any, *args: Any, **options: Any) -> Images:
        given = dict(signature.bind(self, *args, **options).arguments)
        given.update(given.pop("options", {}))
        known: dict[str, Any] = {}
        try:
            known["arguments"] = {
                name: kept(name, value)
                for name, value in given.items()
                if name not in ("self", "progress", *SETTLED)
            }
        except InMemory as reason:
            known["because"] = str(reason)
        images = task(self, *args, **options)
        if (
            "arguments" in images.recipe or "because" in images.recipe
        ):  # of the task that this one is a case of
            return images
        if "arguments" in known:
            known["arguments"] |= {
                name: images.recipe[name] for name in SETTLED if given.get(name) is not None
            }
        return replace(images, recipe={**images.recipe, **known, "replayable": "arguments" in known})

    run.replayable = True  # type: ignore[attr-defined]  # what `ldm.replay` may call by the name in a recipe
    return cast(Task, run)


def kept(name: str, value: Any) -> Any:
    """An argument as JSON can hold it; `InMemory` for one that it cannot."""
    if isinstance(value, Path) or (name in PICTURES and isinstance(value, str)):
        # the task will say that there is none
        return {"path": str(value), "sha256": sha256(value)} if Path(value).is_file() else None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): kept(name, part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [kept(name, part) for part in value]
    raise InMemory(
        f"its {name} was given as {type(value).__name__}, which a recipe does not hold: give pictures as"
        " files"
    )


def restored(name: str, value: Any) -> Any:
    """The argument of a recipe; FileNotFoundError for a file that is not there, ValueError for one that is no
    longer the same."""
    if isinstance(value, list):
        return [restored(name, part) for part in value]
    if not isinstance(value, Mapping) or set(value) != ENTRY:
        return value
    path = Path(value["path"])
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: no such file: {str(path)!r}, of which the picture was made (a relative path counts from"
            " where this runs)"
        )
    if (now := sha256(path)) != value["sha256"]:
        raise ValueError(
            f"{name}: {str(path)!r} is not the file that the picture was made of (sha256 {value['sha256']},"
            f" here {now})"
        )
    return path
