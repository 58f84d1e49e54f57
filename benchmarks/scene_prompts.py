"""The prompts of the six tasks of composition: facts with held-out combinations, by a seeded draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.data import (
    PALETTE,
    THING_COLOURS,
    Facts,
    ImageIndex,
    Thing,
    held_out_background,
    held_out_colour,
    held_out_count,
    held_out_pair,
)
from ldm.data.facts import MOST, Relation
from ldm.data.mix import can_be_stated

ADDED = ("added", "added, composed")
TASKS = ("single", "two", "count", "colour", "position", "attribution")
POSITIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
STYLES_OF_A_NAME = 5  # training images that a name of a prompt has at least
ATTEMPTS = 100_000


def common_names(index: ImageIndex, *, tinted: bool = False) -> list[str]:
    """Return the names with training images in five styles or more, all of which take colours if `tinted`."""
    rows = {
        name: [index[row] for row in own if not index[row].held_out] for name, own in index.rows_of.items()
    }
    return [
        name
        for name, own in rows.items()
        if len(own) >= STYLES_OF_A_NAME and not (tinted and not all(row.tints for row in own))
    ]


def task_prompts(index: ImageIndex, task: str, n: int, seed: int = 0) -> list[Facts]:
    """Return the facts of n prompts of a task; the first ones do not depend on n.

    Every prompt states a combination that is held out of training: the background of its name (single), its
    number (count), its colour (colour), or its pair of names (two, position, attribution). Apart from
    "single", every other prompt states a background as well. No style is stated.

    Args:
        index: The index of the data set.
        task: One of `TASKS`.
        n: Number of prompts.
        seed: Chooses the prompts. Default: 0.

    Raises:
        ValueError: For an unknown task, or if the data set has no such combination.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: expected one of {TASKS}")
    rng = np.random.default_rng([seed, TASKS.index(task)])
    names = common_names(index, tinted=task in ("colour", "attribution"))
    prompts: list[Facts] = []
    for _ in range(ATTEMPTS):
        if len(prompts) == n:
            return prompts
        facts = _draw(task, len(prompts), names, rng) if len(names) > 1 else None
        if facts is not None and facts not in prompts and can_be_stated(facts, index):
            prompts.append(facts)
    raise ValueError(f"{task}: {len(prompts)} of {n} prompts in {ATTEMPTS} draws from {len(names)} names")


def _draw(task: str, i: int, names: Sequence[str], rng: np.random.Generator) -> Facts | None:
    """Draw facts, or None if they are not held out."""
    first, second = (names[k] for k in rng.choice(len(names), 2, replace=False))
    colours = tuple(PALETTE)
    background = colours[rng.integers(len(colours))] if task == "single" or i % 2 else None
    colour, other = (THING_COLOURS[k] for k in rng.choice(len(THING_COLOURS), 2, replace=False))
    if task == "single":
        held = held_out_background(first, background)
        facts = Facts(things=(Thing(name=first),), background=background)
    elif task == "count":
        count = 2 + i % (MOST - 1)
        held = held_out_count(first, count)
        facts = Facts(things=(Thing(name=first),), count=count, background=background)
    elif task == "colour":
        held = held_out_colour(first, colour)
        facts = Facts(things=(Thing(name=first, colour=colour),), background=background)
    else:
        held, coloured = held_out_pair(first, second), task == "attribution"
        things = (
            Thing(name=first, colour=colour if coloured else None),
            Thing(name=second, colour=other if coloured else None),
        )
        relation = POSITIONS[i // 2 % len(POSITIONS)] if task == "position" else "and"
        facts = Facts(things=things, relation=relation, background=background)
    return facts if held else None


def variety_prompts(index: ImageIndex, n: int, seed: int = 0) -> list[Facts]:
    """Return the facts of n prompts that state one of the `common_names` alone."""
    names = common_names(index)
    if len(names) < n:
        raise ValueError(f"n {n}: the data set has {len(names)} names in {STYLES_OF_A_NAME} styles or more")
    chosen = np.random.default_rng([seed, len(TASKS)]).permutation(len(names))[:n]
    return [Facts(things=(Thing(name=names[i]),)) for i in chosen]


def added_prompts(index: ImageIndex, task: str, n: int, seed: int = 0) -> list[Facts]:
    """Return the facts of n prompts, each of which names a held-out image by name and style.

    Args:
        index: The index of the data set.
        task: "added" for the thing alone, or "added, composed": beside another thing, in a relation to one,
            or several times, in turn. Every other prompt states a background.
        n: Number of prompts.
        seed: Chooses the prompts. Default: 0.

    Raises:
        ValueError: For an unknown task, or if fewer images are held out.
    """
    if task not in ADDED:
        raise ValueError(f"task {task!r}: expected one of {ADDED}")
    rng = np.random.default_rng([seed, len(TASKS) + 1 + ADDED.index(task)])
    names = common_names(index)
    prompts: list[Facts] = []
    for row in rng.permutation([i for i in range(len(index)) if index[i].held_out]):
        if len(prompts) == n:
            return prompts
        own, i = index[int(row)], len(prompts)
        background = tuple(PALETTE)[rng.integers(len(PALETTE))] if i % 2 else None
        first = Thing(name=own.name, style=own.style)
        if task == "added":
            facts = Facts(things=(first,), background=background)
        elif i % 3 == 2:
            facts = Facts(things=(first,), count=2 + i // 3 % (MOST - 1), background=background)
        else:
            second = Thing(name=names[rng.integers(len(names))])
            if second.name == first.name:
                continue
            relation = POSITIONS[i // 3 % len(POSITIONS)] if i % 3 else "and"
            facts = Facts(things=(first, second), relation=relation, background=background)
        if can_be_stated(facts, index):
            prompts.append(facts)
    if len(prompts) < n:
        raise ValueError(f"{task}: {len(prompts)} of {n} prompts with the held-out images of the data set")
    return prompts
