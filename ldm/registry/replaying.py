"""Make an image again from its recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.images.result import Images
from ldm.pipelines.replayable import BY_OPTIONS, from_json
from ldm.registry.loading import load
from ldm.support.warn import warn_user

# Entries of a recipe that are not arguments of its task.
ABOUT = ("task", "prompt", "model", "device", "dtype", "replayable", "weights", "versions", "index")


def replay(recipe: Mapping[str, Any], *, weights: str | Path | None = None) -> Images:
    """Return the images of a recipe.

    The pixels are the same on the same machine, with the same versions of the software and number of threads;
    a warning names what differs. Image files that the task was given are read again.

    Args:
        recipe: The recipe, as `Images.recipe` or `ldm.images.files.read_recipe` returns it. If it has an
            "index", only that image is returned.
        weights: File or folder that the model was loaded from, if it was not an embedded one.

    Raises:
        ValueError: If the recipe is not replayable, its task is unknown, or the weights or an image file
            differ from those it names.
        FileNotFoundError: If an image file or the weights are absent.
    """
    if not recipe.get("replayable", False):
        reason = recipe.get(
            "because", "it was made with latents, hooks or images in memory, which a recipe does not hold"
        )
        raise ValueError(f"this image cannot be made again: {reason}")
    arguments = (
        {name: from_json(name, value) for name, value in recipe["arguments"].items()}
        if "arguments" in recipe
        else _task_arguments(recipe)
    )
    pipe = load(recipe["model"], weights=weights, device=recipe["device"], dtype=recipe["dtype"])
    if pipe.origin != recipe["weights"]:
        raise ValueError(
            f"the image was made with other weights of {recipe['model']!r} (sha256 {recipe['weights']},"
            f" here {pipe.origin})"
        )
    task = getattr(pipe, str(recipe["task"]), None)
    if task is None or (recipe["task"] not in BY_OPTIONS and not hasattr(task, "replayable")):
        raise ValueError(f"task {recipe['task']!r}: {recipe['model']!r} has no task of this name")
    images = task(**arguments)
    if changed := recipe_changes(recipe, images.recipe):
        warn_user(f"the pixels may differ: {'; '.join(changed)}")
    if "index" not in recipe:
        return images
    i = recipe["index"]
    return Images(
        tensor=images.tensor[i : i + 1],
        seeds=images.seeds[i : i + 1],
        prompts=images.prompts[i : i + 1],
        recipe=recipe,
    )


def recipe_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two recipes, versions first, each as "KEY OLD then, NEW now"."""
    old = {**then["versions"], **{key: value for key, value in then.items() if key != "versions"}}
    plain = json.loads(json.dumps(dict(now)))  # as the recipe in a file: lists instead of tuples
    new = {**now["versions"], **{key: value for key, value in plain.items() if key != "versions"}}
    return [f"{key} {old.get(key)} then, {value} now" for key, value in new.items() if old.get(key) != value]


def _task_arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a task without image arguments, which the recipe states directly."""
    names = {"text_to_image": "prompt", "class_to_image": "label"}
    first = {names[recipe["task"]]: recipe["prompt"]} if recipe["task"] in names else {}
    return {**first, **{key: value for key, value in recipe.items() if key not in ABOUT}}
