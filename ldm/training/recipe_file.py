"""Recipe files: the stages of a model's training in order, and the bundle that they end in.

A folder holds ``recipe.yaml`` and a YAML file for each stage::

    name: emoji-ldm            # runs are in RUNS/emoji-ldm/STAGE, the model is in RUNS/emoji-ldm/model
    machine: 2 cores           # what `hours` was estimated for
    stages:
    - stage: autoencoder       # autoencoder.yaml
      hours: 0.9
    - stage: draft
      reads: {vae: autoencoder}  # key of draft.yaml: the stage whose export it reads
      hours: 1.6
    - stage: ../other/clip     # a stage of another recipe, trained once for both
    bundle:
      card: card.yaml
      parts: {vae: autoencoder, draft: draft}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.catalog.cards import ModelCard
from ldm.catalog.dalle_cards import DalleCard
from ldm.catalog.lookup import parse_card
from ldm.catalog.unclip_cards import UnCLIPCard
from ldm.registry.bundling import check_part_names
from ldm.support.config import build, nearest, read_yaml
from ldm.support.files import file_exists
from ldm.support.text import escaped, shown
from ldm.training.config_file import build_stage_config, read_stage_file
from ldm.training.kinds import part_kinds
from ldm.training.stages import TrainingStage, get_dotted, set_dotted

RECIPE_FILE = "recipe.yaml"
MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """A stage in a recipe file.

    Args:
        stage: Name of the stage, whose file is NAME.yaml; or RECIPE/NAME, the relative path of another
            recipe's folder and its stage, which is listed there in full.
        reads: The stage that each key of the stage file reads, by dotted key. Default: none.
        hours: Expected cost on the recipe's machine.
        optional: Whether the recipe leaves the stage out; it is trained by its own file. Default: False.
    """

    stage: str
    reads: dict[str, str] = field(default_factory=dict)
    hours: float | None = None
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class BundleEntry:
    """The model that a recipe ends in.

    Args:
        card: File of the model's card, relative to the recipe. The name of its CLIP, if it has one, is
            replaced by that of the trained CLIP.
        parts: The stage that exports each part.
    """

    card: str
    parts: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """The content of ``recipe.yaml``; see the module."""

    name: str
    machine: str
    stages: tuple[StageEntry, ...]
    bundle: BundleEntry


def read_recipe_file(path: str | Path) -> RecipeFile:
    """Read a recipe file, without the files of its stages."""
    try:
        return build(RecipeFile, read_yaml(path))
    except ValueError as error:
        raise ValueError(f"{shown(str(path))}: {escaped(error)}") from None


def resolve_stages(file: RecipeFile, path: Path, runs: str | Path) -> dict[str, TrainingStage]:
    """Read the stage files of a recipe and check them.

    Args:
        file: The content of the recipe file.
        path: The recipe file.
        runs: The folder of runs.

    Returns:
        The stages by name, in order.

    Raises:
        ValueError: If a file is absent or wrong, a stage reads one that does not come before it or does not
            export what it reads, or the bundle names an unknown stage or part.
    """
    stages: dict[str, TrainingStage] = {}
    try:
        for entry in file.stages:
            stage = _resolve_stage(entry, file, path, runs, stages)
            if stage.name in stages or stage.name == MODEL_FOLDER:
                raise ValueError(f"stage {stage.name!r}: expected another name, this one is taken")
            stages[stage.name] = stage
        _check_bundle(file, path, stages)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{shown(str(path))}: {escaped(error)}") from None
    return stages


def _resolve_stage(
    entry: StageEntry, file: RecipeFile, path: Path, runs: str | Path, earlier: Mapping[str, TrainingStage]
) -> TrainingStage:
    """Return the stage of an entry; `earlier` are the stages listed before it."""
    name = entry.stage
    if "/" in name:
        path, name, shared = (path.parent / name).parent / RECIPE_FILE, Path(name).name, entry
        file = read_recipe_file(path)
        entries = {other.stage: other for other in file.stages}
        if name not in entries:
            raise ValueError(f"stage {shared.stage!r}: not listed in {str(path)!r}; {nearest(name, entries)}")
        if shared != StageEntry(stage=shared.stage):
            raise ValueError(f"stage {shared.stage!r}: expected its other keys in {str(path)!r} only")
        entry = entries[name]
    if entry.hours is None:
        raise ValueError(f"stage {name!r}: missing key 'hours'")
    stage_file = path.parent / f"{name}.yaml"
    if not file_exists(stage_file):
        raise ValueError(f"stage {name!r}: no such file: {shown(str(stage_file))}")
    mapping = read_stage_file(stage_file)
    reads = _resolve_reads(entry, file, mapping, earlier)
    part, config = build_stage_config(mapping, stage_file)
    for key, source in reads.items():
        _check_read(name, part, key, source)
    return TrainingStage(
        name=name,
        folder=Path(runs) / file.name / name,
        part=part,
        config=config,
        reads=reads,
        hours=entry.hours,
        optional=entry.optional,
    )


def _resolve_reads(
    entry: StageEntry, file: RecipeFile, mapping: dict[str, Any], earlier: Mapping[str, TrainingStage]
) -> dict[str, TrainingStage]:
    """Return the stages that an entry reads, and set their folders in the mapping of its file."""
    listed = [Path(other.stage).name for other in file.stages]
    for key, name in entry.reads.items():
        where = f"stage {entry.stage!r} reads {name!r}"
        if name not in earlier:
            if name in listed:
                raise ValueError(f"{where}: expected a stage listed before it")
            raise ValueError(f"{where}: no such stage; {nearest(name, earlier)}")
        if earlier[name].optional and not entry.optional:
            raise ValueError(f"{where}: expected a stage that is not optional")
        if get_dotted(mapping, key) is not None:
            raise ValueError(f"{where} as {key}: expected {key} in the recipe only, but the stage sets it")
        set_dotted(mapping, key, str(earlier[name].export))
    return {key: earlier[name] for key, name in entry.reads.items()}


def _check_read(name: str, part: str, key: str, source: TrainingStage) -> None:
    """Raise ValueError unless a part reads a folder under a key, and a stage exports what it reads there."""
    kinds = part_kinds()
    if key not in kinds[part].reads:
        raise ValueError(f"stage {name!r}: reads: {key!r}; {nearest(key, kinds[part].reads)}")
    wanted = kinds[part].reads[key]
    if kinds[source.part].exports.isdisjoint(wanted):
        raise ValueError(
            f"stage {name!r} reads {source.name!r} as {key}: expected a stage that exports"
            f" {' or '.join(wanted)}, it exports {', '.join(sorted(kinds[source.part].exports))}"
        )


def _check_bundle(file: RecipeFile, path: Path, stages: Mapping[str, TrainingStage]) -> None:
    """Raise ValueError if the bundle names an unknown stage or part, or the card is wrong."""
    card = read_recipe_card(path, file.bundle)
    check_part_names(card, file.bundle.parts, "bundle.parts")
    for part, name in file.bundle.parts.items():
        if name not in stages or stages[name].optional:
            required = [stage.name for stage in stages.values() if not stage.optional]
            raise ValueError(f"bundle.parts.{part}: stage {name!r}; {nearest(name, required)}")
        exports = part_kinds()[stages[name].part].exports
        if part.rstrip("0123456789") not in exports:
            raise ValueError(
                f"bundle.parts.{part}: stage {name!r} exports {', '.join(sorted(exports))}, not {part}"
            )


def read_recipe_card(
    path: Path, entry: BundleEntry, clip: str | None = None
) -> ModelCard | UnCLIPCard | DalleCard:
    """Read the card of a recipe's model; `clip` replaces the name of its CLIP, if it is given."""
    source = path.parent / entry.card
    card = parse_card(read_yaml(source), source)
    if not isinstance(card, ModelCard | UnCLIPCard | DalleCard):
        raise ValueError(
            f"{str(source)!r}: expected the card of a latent diffusion model, an unCLIP model or a model of"
            " image tokens"
        )
    return replace(card, clip=clip) if clip is not None and isinstance(card, UnCLIPCard) else card
