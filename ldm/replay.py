"""Making a picture again from its recipe."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.images import Images
from ldm.pipelines.latent import REPLAYABLE
from ldm.registry import load

ABOUT = ("task", "prompt", "model", "device", "dtype", "replayable", "weights", "versions", "index")


def replay(recipe: Mapping[str, Any], *, weights: str | Path | None = None) -> Images:
    """The pictures of a recipe: the same pixels on the same machine with the same versions and number of threads.

    ``weights``: the folder that the model was loaded from, where it was not the embedded one. ValueError for a recipe that cannot be followed, or if
    the weights are others than it names; a warning where versions or threads differ.
    """
    if recipe.get("task") not in REPLAYABLE:
        raise ValueError(f"task {recipe.get('task')!r}: expected one of {', '.join(REPLAYABLE)}; a recipe does not hold pictures")
    if not recipe.get("replayable", False):
        raise ValueError("this picture was made with latents or hooks of the caller's own, which a recipe cannot hold")
    pipe = load(recipe["model"], weights=weights, device=recipe["device"], dtype=recipe["dtype"])
    if pipe.origin != recipe["weights"]:
        raise ValueError(f"the picture was made with other weights of {recipe['model']!r} (sha256 {recipe['weights']}, here {pipe.origin})")
    known = {key: value for key, value in recipe.items() if key not in ABOUT}
    task, prompt = getattr(pipe, recipe["task"]), () if recipe["task"] == "unconditional" else (recipe["prompt"],)
    images = task(*prompt, **known)
    then, now = recipe["versions"], images.recipe["versions"]
    changed = [f"{key} {then.get(key)} then, {value} now" for key, value in now.items() if then.get(key) != value]
    if changed:
        warnings.warn(f"the pixels may differ in their last bits: {'; '.join(changed)}", stacklevel=2)
    if "index" not in recipe:
        return images
    i = recipe["index"]
    return Images(tensor=images.tensor[i : i + 1], seeds=images.seeds[i : i + 1], prompts=images.prompts[i : i + 1], recipe=recipe)
