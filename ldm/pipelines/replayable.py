"""What a recipe states of the arguments of a task, so that the task can be run again."""

from __future__ import annotations

import functools
import inspect
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ldm.images.result import Images
from ldm.pipelines.checks import check_arguments
from ldm.pipelines.recipe import content_sha256
from ldm.pipelines.tasks.deferred import Deferred
from ldm.support.calls import separate_call
from ldm.support.config import build, to_dict
from ldm.support.files import file_exists
from ldm.support.scalars import python_scalar, python_scalars, python_values
from ldm.support.text import shown
from ldm.weights.formats.safetensors import sha256

Task = TypeVar("Task", bound=Callable[..., Images])
# Tasks of which the options in the recipe say all; the recipes of other tasks hold their arguments.
BY_OPTIONS = ("text_to_image", "class_to_image", "unconditional")
FILE_ARGUMENTS = (
    "image",
    "mask",
    "depth",
    "hint",
)  # arguments that are paths if they are texts; of others only a `Path` is
SETTLED = (
    "convention",
    "grid",
    "sizes",
    "controls",
)  # options that the recipe holds already, as plain mappings


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file in a recipe: its path, as it was given, and its SHA-256."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Return the entry of a file."""
        return cls(path=str(path), sha256=sha256(path))

    def check(self, name: str) -> Path:
        """Return the path if the file is the one that was named.

        Args:
            name: Name of the argument, for messages.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it has changed.
        """
        path = Path(self.path)
        if not file_exists(path):
            raise FileNotFoundError(
                f"{name}: no such file: {shown(self.path)}, which the image was made of (a relative path"
                " counts from the current folder)"
            )
        if (now := sha256(path)) != self.sha256:
            raise ValueError(
                f"{name}: {shown(self.path)} is not the file that the image was made of"
                f" (sha256 {shown(self.sha256)}, here {now})"
            )
        return path


ENTRY = {each.name for each in fields(FileEntry)}


class InMemory(Exception):
    """An argument that a recipe cannot hold."""


def replayable(task: Task) -> Task:
    """Make a task a method whose recipe holds its arguments, so that `ldm replay` can run it again.

    Files are held by path and SHA-256. If an argument is an image in memory, a tensor or a function, the
    recipe is not replayable, and states the reason as "because"; "inputs" states the SHA-256 of images and
    tensors. The seed None is replaced by a random one, which the recipe holds.
    """
    signature = inspect.signature(task)
    pipe = next(iter(signature.parameters))
    own = {name: each for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD}

    @functools.wraps(task)
    def run(self: Any, *args: Any, **options: Any) -> Images:
        args, options = python_values(args), python_scalars(options)
        if options.get("seed", 0) is None:
            options["seed"] = secrets.randbelow(2**32)
        given = dict(signature.bind(self, *args, **options).arguments)
        check_arguments(own, given)
        given.update(given.pop("options", {}))
        known: dict[str, Any] = {}
        try:
            known["arguments"] = {
                name: as_json(name, value)
                for name, value in given.items()
                if name not in (pipe, "progress", *SETTLED)
            }
        except InMemory as reason:
            inputs = {name: input_sha256(name, value) for name, value in given.items() if name != pipe}
            known["because"] = str(reason)
            known["inputs"] = {name: value for name, value in inputs.items() if value is not None}

        def with_arguments(images: Images) -> Images:
            if "arguments" in images.recipe or "because" in images.recipe:
                return images  # the recipe of another task, which this one is a case of
            if "arguments" in known:
                known["arguments"] |= {
                    name: images.recipe[name] for name in SETTLED if given.get(name) is not None
                }
            recipe = {**images.recipe, **known, "replayable": "arguments" in known}
            return replace(images, recipe=recipe)

        try:
            with separate_call(self):
                images = task(self, *args, **options)
        except Deferred as drawing:
            drawing.then(with_arguments)
            raise
        return with_arguments(images)

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
        return to_dict(FileEntry.of(Path(value))) if Path(value).is_file() else None
    value = python_scalar(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(name, part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [as_json(name, part) for part in value]
    raise InMemory(
        f"its {name} was given as {type(value).__name__}, which a recipe does not hold: give images as files"
    )


def input_sha256(name: str, value: Any) -> str | None:
    """Return the SHA-256 of a file, or of the content of an image or a tensor; None for another argument."""
    if isinstance(value, Path) or (name in FILE_ARGUMENTS and isinstance(value, str)):
        return sha256(value) if Path(value).is_file() else None
    return content_sha256(value)


def from_json(name: str, value: Any) -> Any:
    """Return the argument that a recipe holds, with a `FileEntry` in place of each file.

    Args:
        name: Name of the argument.
        value: Its value in the recipe.

    Raises:
        ValueError: If a file is named without its SHA-256.
    """
    if isinstance(value, list):
        return [from_json(name, part) for part in value]
    if isinstance(value, Mapping) and name == "controls":
        return {str(key): from_json(str(key), part) for key, part in value.items()}
    if isinstance(value, Mapping) and set(value) == ENTRY:
        return build(FileEntry, value, name)
    if name in FILE_ARGUMENTS and value is not None:
        raise ValueError(
            f"{name}: expected a file with its path and sha256, as recipes name them, got {shown(value)}"
        )
    return value
