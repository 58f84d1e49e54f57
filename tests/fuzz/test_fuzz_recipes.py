"""Damaged recipes inside images: read and compared by replay, or refused with a reason before any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fuzzing import Target, check
from image_mutations import mutated_png, mutated_recipe, with_recipe
from mutations import mixed, mutated_bytes

from ldm.images.files import read_recipe
from ldm.registry.replaying import checked_recipe, compare_weights, recipe_changes

HASHES = {"unet": "0" * 64, "vae": "1" * 64, "text": "2" * 64, "card": "3" * 64}
FACTS: dict[str, Any] = {
    "model": "emoji-ldm",
    "device": "cpu",
    "dtype": "float32",
    "replayable": True,
    "weights": HASHES,
    "versions": {"ldm": "1.0", "torch": "2.14.1", "python": "3.12.1", "threads": 2},
    "pixels": "4" * 64,
}
OPTIONS: dict[str, Any] = {"seed": [0, 1], "n": 2, "steps": 4, "guidance": 2.0, "sampler": "dpmpp_2m"}
RECIPES: list[dict[str, Any]] = [
    {"task": "text_to_image", "prompt": ["a red apple"], "negative": [""], "height": 64, "width": 64}
    | {"convention": None, "sizes": None, "eta": 0.5, "index": 1, **OPTIONS, **FACTS},
    {"task": "text_to_image", "prompt": ["cat"], "grid": {"t": [999.0, 500.0, 0.0]}, **OPTIONS, **FACTS}
    | {"loaded": {"prediction": "eps", "ema": True, "variant": "fp16"}, "convention": "diffusers"},
    {"task": "edit", **FACTS, "inputs": {"image": "5" * 64}, "because": "a reason"}
    | {"arguments": {"source": "a cat", "target": "a dog", "emphasis": {"dog": 1.5}, "seed": 3}},
    {"task": "image_to_image", **FACTS}
    | {
        "arguments": {
            "prompt": "a cat",
            "image": {"path": "no/such.png", "sha256": "5" * 64},
            "strength": 0.5,
        }
    },
    {"task": "outpaint", **FACTS, "model": "sd-v1-5"}
    | {"arguments": {"prompt": "a sea", "left": 8, "feather": 4, "tile": 64, "steps": None, "window": 32}},
]


def read(path: Path) -> None:
    """Read the recipe in an image, and do all that replay does before it looks for the model."""
    recipe = read_recipe(path)
    facts = checked_recipe(recipe).facts
    compare_weights(facts, HASHES)
    recipe_changes(recipe, RECIPES[0])


def test_damaged_recipes_in_images(tmp_path: Path) -> None:
    recipes = [json.dumps(recipe).encode() for recipe in RECIPES]
    images = [with_recipe(recipe, form) for recipe in recipes for form in ("PNG", "JPEG", "WEBP")]
    target = Target(name="recipes in images", read=read, names="", allowed=(ValueError, FileNotFoundError))
    damage = mixed(mutated_png, mutated_bytes)
    check(
        target,
        images,
        lambda seeds, rng: mutated_recipe(recipes, rng) if rng.random() < 0.7 else damage(seeds, rng),
        tmp_path,
    )
