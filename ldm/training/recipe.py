"""Train the stages of a recipe, and bundle the model; see `ldm.training.recipe_file` for its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.registry.bundling import bundle
from ldm.support.config import nearest
from ldm.support.files import write_atomically
from ldm.training.caches.embeddings import clip_name
from ldm.training.config_file import build_stage_config, read_stage_file
from ldm.training.distributed.group import current_processes
from ldm.training.loop import check_until
from ldm.training.recipe_file import (
    MODEL_FOLDER,
    RECIPE_FILE,
    RecipeFile,
    read_recipe_card,
    read_recipe_file,
    resolve_stages,
)
from ldm.training.stages import TrainingStage


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe that was read and checked.

    Args:
        path: The recipe file.
        file: Its content.
        stages: The stages by name, in order.
        model: The folder of the bundled model.
    """

    path: Path
    file: RecipeFile
    stages: dict[str, TrainingStage]
    model: Path

    def required(self) -> list[TrainingStage]:
        """Return the stages that are not optional."""
        return [stage for stage in self.stages.values() if not stage.optional]

    def plan(self) -> str:
        """Describe the stages, their expected cost and how far each is."""
        required = self.required()
        hours = sum(stage.hours or 0 for stage in required)
        left = sum(stage.hours or 0 for stage in required if not stage.finished)
        lines = [
            f"{self.file.name}: {len(required)} stages, about {hours:.1f} hours ({left:.1f} left) on"
            f" {self.file.machine}"
        ]
        width = max(len(name) for name in self.stages)
        for stage in self.stages.values():
            status = "optional, left out" if stage.optional else stage.status()
            lines.append(f"  {stage.name:<{width}}  {stage.hours or 0:4.1f} h  {status}")
        return "\n".join([*lines, f"  model: {self.model}"])

    def check(self) -> None:
        """Raise ValueError if a stage was begun with another configuration or from another export."""
        for stage in self.stages.values():
            stage.check_unchanged()

    def bundle(self) -> Path:
        """Bundle the exports into the model's folder, with the curves of all stages, and return it."""
        exports = {part: self.stages[name].export for part, name in self.file.bundle.parts.items()}
        clip = clip_name(exports["vision"]) if "vision" in exports else None
        folder = bundle(read_recipe_card(self.path, self.file.bundle, clip), exports, self.model)
        for stage in self.required():
            for curve in stage.export.glob("*.jsonl"):
                write_atomically(folder / curve.name, curve.read_bytes())
        return folder


def train_recipe(
    path: str | Path,
    *,
    runs: str | Path = "runs",
    device: torch.device | str = "cpu",
    until: int | str | None = None,
    dry_run: bool = False,
    report: Callable[[str], object] | None = None,
    progress: bool = True,
) -> Path | None:
    """Train the stages of a recipe that are not finished, and bundle the model.

    An interrupted stage resumes from its last checkpoint, with the same result as without interruption. Every
    file is read and checked before any training.

    Args:
        path: A recipe's folder, its recipe file, or the file of a single stage.
        runs: The folder of runs. Default: "runs".
        device: Where to train. Default: "cpu".
        until: A step: stop with a checkpoint when a stage reaches it. The name of a stage: stop when it is
            finished. None: train to the end. Default: None.
        dry_run: Whether to report the plan only. Default: False.
        report: Called with the plan, and with a line before each stage. Default: None.
        progress: Whether to show a progress bar on a terminal. Default: True.

    Returns:
        The model's folder (of a single stage: that of its export), or None if training stopped before.

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If a file is wrong, `until` is neither a stage nor a step of at least 1, or a stage was
            begun with another configuration or from another export.
    """
    report = report or (lambda line: None)
    if not isinstance(until, str):
        check_until(until)
    if not is_recipe(path):
        return _train_stage_file(path, runs, device, until, dry_run, report, progress)
    recipe = open_recipe(path, runs)
    if isinstance(until, str) and until not in recipe.stages:
        raise ValueError(f"until: stage {until!r}; {nearest(until, recipe.stages)}")
    recipe.check()
    report(recipe.plan())
    if dry_run:
        return None
    for stage in recipe.required():
        if not stage.finished:
            stage.check_unchanged()
            report(f"stage {stage.name}: {stage.status()}")
            step = until if isinstance(until, int) and until > stage.step else None
            if not stage.train(device=device, until=step, progress=progress):
                report(f"stopped in stage {stage.name}: {stage.status()}")
                return None
        if until == stage.name:
            return None
    return current_processes().once(recipe.bundle)


def _train_stage_file(
    path: str | Path,
    runs: str | Path,
    device: torch.device | str,
    until: int | str | None,
    dry_run: bool,
    report: Callable[[str], object],
    progress: bool,
) -> Path | None:
    if isinstance(until, str):
        raise ValueError(f"until: expected a step for a single stage, got {until!r}")
    stage = find_stage(path, runs)
    stage.check_unchanged()
    report(f"stage {stage.name}: {stage.status()}")
    if dry_run:
        return None
    if unfinished := [source.name for source in stage.reads.values() if not source.finished]:
        raise ValueError(
            f"stage {stage.name!r} reads {unfinished[0]!r}, which is not finished: train the recipe in"
            f" {str(Path(path).parent)!r}, or that stage"
        )
    return stage.export if stage.train(device=device, until=until, progress=progress) else None


def is_recipe(path: str | Path) -> bool:
    """Return whether a path is the folder or the file of a recipe."""
    return Path(path).is_dir() or Path(path).name == RECIPE_FILE


def find_stage(path: str | Path, runs: str | Path = "runs") -> TrainingStage:
    """Return the stage of a stage file: as the recipe beside it lists it, or alone."""
    path = Path(path)
    recipe = path.parent / RECIPE_FILE
    if recipe.is_file():
        file = read_recipe_file(recipe)
        if path.name in [f"{entry.stage}.yaml" for entry in file.stages]:
            return open_recipe(recipe, runs).stages[path.stem]
    part, config = build_stage_config(read_stage_file(path), path)
    return TrainingStage(name=config.run.name, folder=Path(runs) / config.run.name, part=part, config=config)


def open_recipe(path: str | Path, runs: str | Path = "runs") -> Recipe:
    """Read a recipe and all its files, and check them.

    Args:
        path: The recipe's folder, or its recipe file.
        runs: The folder of runs. Default: "runs".

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If a file is wrong; see `resolve_stages`.
    """
    path = Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)
    file = read_recipe_file(path)
    stages = resolve_stages(file, path, runs)
    return Recipe(path=path, file=file, stages=stages, model=Path(runs) / file.name / MODEL_FOLDER)
