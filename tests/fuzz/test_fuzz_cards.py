"""Damaged YAML: cards, configurations and recipes of trainings are read, or refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml
from fuzzing import Target, check
from text_mutations import in_folder, mutated_file, mutated_yaml, place_in_folder
from tiny_trainings import configs

from ldm.catalog.cards import DiffusionCard
from ldm.catalog.lookup import ASSETS, read_card
from ldm.catalog.published import CARDS
from ldm.catalog.published_unclip import PRIOR_CARDS, UNCLIP_CARDS
from ldm.support.config import config_sha256, to_dict
from ldm.support.strict_yaml import format_yaml
from ldm.training.config_file import build_stage_config, read_stage_file
from ldm.training.recipe_file import RECIPE_FILE, read_recipe_file, resolve_stages

PUBLISHED = ("sd-v1-5", "sdxl-base", "ldm-cin256", "karlo-v1-alpha", "kandinsky-2-2", "dalle2-prior")
CONFIGS = Path(__file__).parents[2] / "configs"
EITHER = (ValueError, FileNotFoundError)


def use_card(path: Path) -> None:
    """Read a card, and what `ldm` computes of it before weights are read."""
    card = read_card(path)
    config_sha256(card.settings())
    format_yaml(to_dict(card), "card")
    card.part_folders(path.parent)
    for stage in card.stages().values():
        stage.grids()
        if isinstance(stage, DiffusionCard):
            stage.schedule.make()


def test_damaged_cards(tmp_path: Path) -> None:
    seeds = [path.read_bytes() for path in sorted(ASSETS.glob("*/card.yaml"))]
    known = {**CARDS, **UNCLIP_CARDS, **PRIOR_CARDS}
    seeds += [format_yaml(to_dict(known[name]), name) for name in PUBLISHED if name in known]
    seeds.append(b"base: sd-v1-5\nname: mine\nsummary: text\n")
    check(Target(name="cards", read=use_card), seeds, mutated_yaml, tmp_path)


def use_stage(path: Path) -> None:
    """Read the configuration of a training."""
    _, config = build_stage_config(read_stage_file(path), path)
    to_dict(config)


def test_damaged_training_configurations(tmp_path: Path) -> None:
    seeds = [yaml.safe_dump(config, sort_keys=False).encode() for config in configs(Path("data")).values()]
    target = Target(name="trainings", read=use_stage, allowed=EITHER)
    check(target, seeds, mutated_yaml, tmp_path)


def use_recipe(folder: Path) -> None:
    """Read the recipe of a model, with the files of its stages and its card."""
    path = folder / RECIPE_FILE
    for stage in resolve_stages(read_recipe_file(path), path, folder / "runs").values():
        stage.recorded_config()


def test_damaged_recipes_of_trainings(tmp_path: Path) -> None:
    base = shutil.copytree(CONFIGS / "emoji-ldm", tmp_path / "base")
    name = "recipes of trainings"
    target = Target(name=name, read=use_recipe, place=place_in_folder, allowed=EITHER, short=100)
    check(
        target,
        in_folder(base, (RECIPE_FILE, "card.yaml", "exemplar.yaml", "layout.yaml")),
        mutated_file,
        tmp_path,
    )
