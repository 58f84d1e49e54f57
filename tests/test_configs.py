"""The recipes in the repository, and the configurations of the trials, are accepted by training."""

from __future__ import annotations

from pathlib import Path

import pytest
import trials
import yaml

from ldm.catalog.lookup import ASSETS, read_card
from ldm.training.recipe import open_recipe
from ldm.training.recipe_file import read_recipe_card
from ldm.training.run import read_training_config
from ldm.training.stages import get_dotted
from ldm.weights.formats.ldm_folder import read_part_config

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(
    folder for folder in CONFIGS.iterdir() if folder.name != "examples"
)  # which are stages alone
EMBEDDED = [
    folder
    for folder in RECIPES
    if folder.name in ("emoji-dalle", "emoji-ldm", "emoji-ldm-turbo", "emoji-unclip")
]  # shipped


@pytest.mark.parametrize("path", sorted((CONFIGS / "examples").iterdir()), ids=lambda path: path.stem)
def test_an_example_is_read(path: Path) -> None:
    assert read_training_config(path)[1].run.steps > 0


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_a_recipe_is_complete(folder: Path) -> None:
    recipe = open_recipe(folder)
    assert recipe.file.name == folder.name
    files = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")}
    stages = [path for path, mapping in files.items() if "part" in mapping]
    bases = {mapping.get("base") for mapping in files.values()}
    other = {"recipe.yaml", recipe.file.bundle.card, *bases} - {path.name for path in stages}
    own = {path.stem for path in files if path.name not in other}
    assert own == {name for name, stage in recipe.stages.items() if stage.folder.parent.name == folder.name}
    for name, stage in recipe.stages.items():
        assert stage.config.run.name == name and stage.hours
    for name in own:
        assert read_training_config(folder / f"{name}.yaml") == (
            recipe.stages[name].part,
            recipe.stages[name].config,
        )


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda folder: folder.name)
def test_the_card_of_a_recipe_is_that_of_the_embedded_model(folder: Path) -> None:
    recipe = open_recipe(folder)
    card = read_recipe_card(recipe.path, recipe.file.bundle)
    embedded = read_card(ASSETS / folder.name / "card.yaml")
    places = {"folder", "parts", "hub", "files"}  # where the weights are
    assert {key: value for key, value in vars(card).items() if key not in places} == {
        key: value for key, value in vars(embedded).items() if key not in places
    }


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda folder: folder.name)
def test_the_trained_networks_have_the_shapes_of_the_embedded_ones(folder: Path) -> None:
    recipe = open_recipe(folder)
    card = read_card(ASSETS / folder.name / "card.yaml")
    for part, where in card.part_folders(ASSETS / folder.name).items():
        config = recipe.stages[recipe.file.bundle.parts[part]].config
        if part not in ("text", "vision", "words"):  # their vocabulary is that of the data set
            names = (part, "shape" if part == "decoder" else "model")
            shape = next(getattr(config, name) for name in names if hasattr(config, name))
            assert shape == read_part_config(where, part), part


@pytest.mark.parametrize("question", list(trials.trials(6400)))
def test_every_trial_differs_from_its_stage_as_stated(question: str, tmp_path: Path) -> None:
    for answer, stages in trials.trials(6400)[question].items():
        for stage, changes in stages:
            config = trials.trial_config(stage, changes, 6400)
            path = tmp_path / "trial.yaml"
            path.write_text(yaml.safe_dump(config), encoding="utf-8")
            _, built = read_training_config(path)
            assert built.run.steps == changes.get("run.steps", 6400 // built.run.batch), answer
            for key, value in changes.items():
                if key != "run.steps":
                    assert get_dotted(config, key) == value
