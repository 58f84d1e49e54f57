"""The configurations in the repository, and those of the trials: all of them are ones that training
accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import trials
import yaml

from ldm.training.run import read_training_config

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_accepted_and_runs_under_its_own_name(path):
    _, config = read_training_config(path)
    assert config.run.name == path.stem


@pytest.mark.parametrize("question", list(trials.trials(6400)))
def test_every_trial_is_a_configuration_that_differs_from_its_base_as_it_says(question, tmp_path):
    for answer, stages in trials.trials(6400)[question].items():
        for base, changes in stages:
            config = trials.stage_config(base, changes, 6400)
            path = tmp_path / "trial.yaml"
            path.write_text(yaml.safe_dump(config))
            _, built = read_training_config(path)
            assert built.run.steps == changes.get("run.steps", 6400 // built.run.batch), answer
            for key, value in changes.items():
                if key != "run.steps":
                    target = config
                    for part in key.split("."):
                        target = target[part]
                    assert target == value
