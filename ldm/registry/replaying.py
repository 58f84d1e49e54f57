"""Make an image again from its recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ldm.images.result import Images, pixel_sha256
from ldm.pipelines.control.control_use import StatedControl
from ldm.pipelines.control.loaded_control import ControlEntry
from ldm.pipelines.loaded_adapter import AdapterEntry
from ldm.pipelines.replayable import BY_OPTIONS, FileEntry
from ldm.registry.loading import load_model
from ldm.registry.locating import WeightsRequest, resolve_card
from ldm.registry.replay_adapters import Given, find_additions
from ldm.registry.replay_options import LIMITS, check_limits, typed_options
from ldm.speed.optimization import optimize
from ldm.support.config import build
from ldm.support.device import dtype_of, pick_device
from ldm.support.text import escaped, shown
from ldm.support.warn import warn_user
from ldm.weights.formats.safetensors import fingerprint
from ldm.weights.hashing import FileHashes

SAFETY = "safety/"  # begins the names of a safety checker's files
COMPARED_OTHERWISE = ("versions", "weights", "pixels", "index")  # entries that are compared in another way
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?")


@dataclass(frozen=True, kw_only=True)
class LoadedWith:
    """Options of `ldm.load` in a recipe; see there."""

    ema: bool | None = None
    variant: str | None = None
    prediction: Literal["eps", "x0", "v"] | None = None


@dataclass(frozen=True, kw_only=True)
class RecipeFacts:
    """The entries of a recipe that are not options of its task.

    Args:
        task: Name of the pipeline's method.
        model: Name of the model.
        device: What it computed on.
        dtype: Dtype of the denoiser's parameters.
        computed_in: What it computed in, where that is another dtype.
        replayable: Whether the recipe holds all that the images depend on.
        because: Why it is not replayable.
        weights: SHA-256 of all files and settings that the images depend on, by name.
        versions: Versions of the software, and the number of threads.
        loaded: Options of `ldm.load`.
        adapters: The adapters, in the order in which they were loaded.
        control_networks: The networks of the controls.
        arguments: Arguments of the task; None if they are the recipe's other entries.
        inputs: SHA-256 of images that were given in memory.
        pixels: SHA-256 of the image's pixels.
        index: Number of the image among those of the call; None for all in one grid.
    """

    task: str
    model: str
    device: str
    dtype: str
    computed_in: str | None = None
    replayable: bool = False
    because: str = "it was made with latents, hooks or images in memory, which a recipe does not hold"
    weights: Mapping[str, str]
    versions: Mapping[str, str | int]
    loaded: LoadedWith = LoadedWith()
    adapters: tuple[AdapterEntry, ...] = ()
    control_networks: tuple[ControlEntry, ...] = ()
    arguments: Mapping[str, Any] | None = None
    inputs: Mapping[str, str | None] | None = None
    pixels: str | None = None
    index: int | None = None


FACTS = tuple(each.name for each in fields(RecipeFacts))


def replay(
    recipe: Mapping[str, Any],
    *,
    weights: str | Path | None = None,
    limits: bool = True,
    download: bool = False,
    vocabulary: str | Path | None = None,
    safety: str | Path | None = None,
    adapters: Given = None,
    controls: Given = None,
) -> Images:
    """Return the images of a recipe.

    The pixels are the same on the same machine, with the same versions of the software and number of threads;
    a warning names what differs. Image files that the task was given are read again. All that the recipe
    names is compared before anything is generated, and what can be compared without the weights before these
    are looked for.

    Args:
        recipe: The recipe, as `Images.recipe` or `ldm.images.files.read_recipe` returns it. If it has an
            "index", only that image is returned.
        weights: File or folder that the model was loaded from, if it was not an embedded one.
        limits: Whether a recipe beyond `ldm.registry.replay_options.LIMITS` is refused. Default: True.
        download: Whether weights that are not on this machine are downloaded. Default: False.
        vocabulary: See `ldm.load`.
        safety: File or folder of the safety checker, if it made images black.
        adapters, controls: Files of the adapters and controls that the recipe names, or folders with them.
            Default: the folders "adapters" and "controls" below LDM_HOME.

    Raises:
        ValueError: If the recipe is damaged, not replayable or beyond the limits, its task is unknown, or the
            weights or an image file differ from those it names.
        FileNotFoundError: If an image file, an adapter or the weights are absent.
    """
    checked = checked_recipe(recipe, weights=weights, limits=limits)
    facts = checked.facts
    arguments = {name: _checked_files(name, value) for name, value in checked.arguments.items()}
    load_additions = find_additions(facts.adapters, adapters, facts.control_networks, controls)
    if (black := any(name.startswith(SAFETY) for name in facts.weights)) and safety is None:
        raise ValueError("the image was made with a safety checker that makes images black: pass safety=PATH")
    request = WeightsRequest(
        weights=weights,
        dtype=dtype_of(facts.dtype),
        vocabulary=vocabulary,
        download=download,
        **{name: value for name, value in vars(facts.loaded).items() if value is not None},
    )
    pipe = load_model(facts.model, _device(facts.device), request, safety=safety, black=black)
    if facts.computed_in is not None:
        optimize(pipe)  # widens the parameters again
    origin = pipe.origin
    if black:
        origin = origin.joined({f"{SAFETY}{name}": value for name, value in pipe.safety.origin.items()})
    notes = compare_weights(facts, origin)
    load_additions(pipe)
    images = _run(facts, pipe, arguments)
    notes += recipe_changes(recipe, images.recipe)
    images = images if facts.index is None else _one_image(images, facts.index, recipe)
    _warn_of_differences(facts, images, notes)
    return images


@dataclass(frozen=True, kw_only=True)
class CheckedRecipe:
    """A recipe that may be followed: its facts, and the arguments of its task, of checked types."""

    facts: RecipeFacts
    arguments: Mapping[str, Any]


def checked_recipe(
    recipe: Mapping[str, Any], *, weights: str | Path | None = None, limits: bool = True
) -> CheckedRecipe:
    """Return what a recipe states, after all checks that need neither its files nor the weights.

    Args:
        recipe: The recipe.
        weights: See `replay`; the card of a model's folder is read. Default: None.
        limits: See `replay`. Default: True.

    Raises:
        ValueError: If the recipe is damaged, not replayable, of an unknown model, or beyond the limits.
    """
    facts = build(RecipeFacts, {key: value for key, value in recipe.items() if key in FACTS}, "recipe")
    if not facts.replayable:
        raise ValueError(f"this image cannot be made again: {escaped(facts.because, 500)}")
    arguments = _task_arguments(facts, recipe)
    card, _ = resolve_card(facts.model, weights)
    if limits:
        check_limits(arguments, card.usual(), LIMITS)
    return CheckedRecipe(facts=facts, arguments=arguments)


def _warn_of_differences(facts: RecipeFacts, images: Images, notes: list[str]) -> None:
    """Warn if the pixels are not those that the recipe names, or may be others, and say why."""
    if facts.pixels is None and notes:
        warn_user(f"the pixels may differ: {'; '.join(notes)}")
    elif facts.pixels is not None and facts.pixels != pixel_sha256(images.grid()):
        notes = notes or ["the weights were changed in memory, or it was another processor"]
        warn_user(f"the pixels are not those of the image: {'; '.join(notes)}")


def _task_arguments(facts: RecipeFacts, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the task, of checked types, with a `FileEntry` for each file."""
    if facts.arguments is not None:
        return typed_options(facts.arguments)
    if facts.task not in BY_OPTIONS:
        raise ValueError(f"arguments: expected those of the task {shown(facts.task)}, got none")
    options = {name: value for name, value in recipe.items() if name not in FACTS}
    prompt = options.pop("prompt", None)
    first = {"text_to_image": "prompt", "class_to_image": "label"}.get(facts.task)
    return typed_options({**({} if first is None else {first: prompt}), **options})


def _checked_files(name: str, value: Any) -> Any:
    """Return an argument with the path in place of each `FileEntry`; ValueError if a file has changed."""
    if isinstance(value, FileEntry):
        return value.check(name)
    if isinstance(value, StatedControl):
        return value.checked()
    return [_checked_files(name, each) for each in value] if isinstance(value, list) else value


def _device(name: str) -> torch.device:
    """Return the device of a recipe; ValueError if this machine has none of this name."""
    if not DEVICE.fullmatch(name):
        raise ValueError(f"recipe.device: expected a name such as cpu or cuda:0, got {shown(name)}")
    try:
        return pick_device(name)
    except ValueError as error:
        raise ValueError(f"recipe.{error}") from None


def compare_weights(facts: RecipeFacts, origin: Mapping[str, str]) -> list[str]:
    """Compare the files and settings that a recipe names with those of the model that was loaded.

    Args:
        facts: The recipe.
        origin: SHA-256 of the model's files and settings.

    Returns:
        What cannot be compared, because the recipe is that of an earlier version.

    Raises:
        ValueError: If one differs.
    """
    files = origin.files if isinstance(origin, FileHashes) else {}
    notes = []
    for name, then in facts.weights.items():
        now = origin.get(name, "none")
        if now == then:
            continue
        if name in files and then == fingerprint(files[name]):
            notes.append(f"only samples of {escaped(name, 100)} can be compared")
            continue
        raise ValueError(
            f"the image was made with other weights of {shown(facts.model)}: {escaped(name, 100)} (sha256"
            f" {shown(then)}, here {shown(now)})"
        )
    if unnamed := sorted(origin.keys() - facts.weights.keys()):
        notes.append(
            f"{', '.join(unnamed)} cannot be compared, as the recipe, of an earlier version, does not name"
            " them"
        )
    return notes


def _run(facts: RecipeFacts, pipe: Any, arguments: Mapping[str, Any]) -> Images:
    """Run the task of a recipe; ValueError if there is none of its name, or it cannot use the arguments."""
    task = getattr(type(pipe), facts.task, None)
    if task is None or (facts.task not in BY_OPTIONS and not hasattr(task, "replayable")):
        raise ValueError(f"task {shown(facts.task)}: {shown(facts.model)} has no task of this name")
    try:
        images: Images = task(pipe, **arguments)
    except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        raise ValueError(
            f"the arguments of the recipe do not fit its task {facts.task}: {escaped(error, 500)}"
        ) from error
    return images


def _one_image(images: Images, index: int, recipe: Mapping[str, Any]) -> Images:
    if not 0 <= index < len(images):
        raise ValueError(f"recipe.index: expected 0 to {len(images) - 1}, got {shown(index)}")
    one = slice(index, index + 1)
    return Images(
        tensor=images.tensor[one], seeds=images.seeds[one], prompts=images.prompts[one], recipe=recipe
    )


def recipe_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two recipes, versions first, each as "KEY OLD then, NEW now"."""

    def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
        plain = json.loads(json.dumps(dict(recipe)))  # as the recipe in a file: lists instead of tuples
        return {
            **plain["versions"],
            **{key: each for key, each in plain.items() if key not in COMPARED_OTHERWISE},
        }

    old, new = flat(then), flat(now)
    return [
        f"{escaped(key, 100)} {shown(old.get(key))} then, {shown(value)} now"
        for key, value in new.items()
        if old.get(key) != value
    ]
