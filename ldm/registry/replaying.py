"""Making a picture again from its recipe."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.images.result import Images
from ldm.pipelines.replayable import BY_OPTIONS, from_json
from ldm.registry.loading import load

ABOUT = ("task", "prompt", "model", "device", "dtype", "replayable", "weights", "versions", "index")


def replay(recipe: Mapping[str, Any], *, weights: str | Path | None = None) -> Images:
    """The pictures of a recipe: the same pixels on the same machine with the same versions and number of
    threads.

    ``weights``: the folder that the model was loaded from, where it was not the embedded one. The files that
    a picture was made of are read again. ValueError for a recipe that cannot be followed, or if the weights
    or a file are others than it names; FileNotFoundError for a file that is gone; a warning where versions,
    threads or what a card says differ.
    """
    if not recipe.get("replayable", False):
        reason = recipe.get(
            "because", "it was made with latents, hooks or pictures in memory, which a recipe does not hold"
        )
        raise ValueError(f"this picture cannot be made again: {reason}")
    arguments = (
        {name: from_json(name, value) for name, value in recipe["arguments"].items()}
        if "arguments" in recipe
        else _options(recipe)
    )
    pipe = load(recipe["model"], weights=weights, device=recipe["device"], dtype=recipe["dtype"])
    if pipe.origin != recipe["weights"]:
        raise ValueError(
            f"the picture was made with other weights of {recipe['model']!r} (sha256 {recipe['weights']},"
            f" here {pipe.origin})"
        )
    task = getattr(pipe, str(recipe["task"]), None)
    if recipe["task"] not in BY_OPTIONS and not hasattr(task, "replayable"):
        raise ValueError(f"task {recipe['task']!r}: {recipe['model']!r} has no task of this name")
    images = task(**arguments)
    then, now = recipe["versions"], images.recipe["versions"]
    changed = [
        f"{key} {then.get(key)} then, {value} now" for key, value in now.items() if then.get(key) != value
    ]
    said = json.loads(json.dumps(dict(images.recipe)))
    changed += [
        f"{key} {recipe.get(key)} then, {value} now"
        for key, value in said.items()
        if key != "versions" and recipe.get(key) != value
    ]
    if changed:
        warnings.warn(f"the pixels may differ: {'; '.join(changed)}", stacklevel=2)
    if "index" not in recipe:
        return images
    i = recipe["index"]
    return Images(
        tensor=images.tensor[i : i + 1],
        seeds=images.seeds[i : i + 1],
        prompts=images.prompts[i : i + 1],
        recipe=recipe,
    )


def _options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a task that is given no pictures, of which the recipe says all."""
    names = {"text_to_image": "prompt", "class_to_image": "label"}
    first = {names[recipe["task"]]: recipe["prompt"]} if recipe["task"] in names else {}
    return {**first, **{key: value for key, value in recipe.items() if key not in ABOUT}}
