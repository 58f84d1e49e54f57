"""Folders with a damaged file: the cases that fuzzing and reading found, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.registry.inspection import inspect
from ldm.support.files import file_exists
from ldm.weights.formats.diffusers_folder import read_component, read_folder, read_index
from ldm.weights.formats.safetensors import write_safetensors


@pytest.mark.parametrize("name", ["", "..", "../unet", "a/b_scheduler", "x" * 300 + "_scheduler", "x" * 300])
def test_a_component_of_a_pipeline_is_a_sub_folder(tmp_path: Path, name: str) -> None:
    index = {"_class_name": "A", "unet": ["diffusers", "B"], name: ["diffusers", "C"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_index.json': expected names of sub-folders, got '"):
        read_folder(tmp_path, parts=())
    assert any("names of sub-folders" in each for each in inspect(tmp_path).problems)


@pytest.mark.parametrize(("given", "expected"), [(5, ""), ("AB", ""), ([], ""), ({}, ""), (["C", "D"], "C")])
def test_a_component_without_a_class_has_the_first_architecture(
    tmp_path: Path, given: object, expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": given}), encoding="utf-8")
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(1)}, {})
    assert read_component(tmp_path).class_name == expected


def test_names_of_shards_are_shown_in_one_line(tmp_path: Path) -> None:
    for name, error in (
        ("a\x1b[2J", FileNotFoundError),
        ("b" * 5000, FileNotFoundError),
        ("../c", ValueError),
    ):
        (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"x": name}}), encoding="utf-8")
        with pytest.raises(error) as caught:
            read_index(tmp_path / "index.json")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_names_that_no_file_can_have_are_those_of_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("", encoding="utf-8")
    found = {name: file_exists(tmp_path / name) for name in ("a", "b", "x" * 300, "a\0", "a/b", ".")}
    assert found == {**dict.fromkeys(found, False), "a": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model whose card states no hashes."""
    folder = ldm.save(tiny_model("mine"), tmp_path_factory.mktemp("whole") / "model")
    edit(folder / "card.yaml", files=None)
    return folder


def edit(path: Path, **changes: Any) -> str:
    """Change entries of a YAML file, and return what it held."""
    before = path.read_text(encoding="utf-8")
    path.write_text(yaml.safe_dump({**yaml.safe_load(before), **changes}), encoding="utf-8")
    return before


@pytest.mark.parametrize(
    "training", [{"config": 5}, {"config": {"run": "x"}}, {"config": {"run": {"name": "a\x1b"}}}]
)
def test_what_a_part_states_of_its_training_is_shown_whatever_it_is(whole: Path, training: Any) -> None:
    before = edit(whole / "vae.yaml", training={**training, "steps": "1\n2"})
    report = inspect(whole)
    (whole / "vae.yaml").write_text(before, encoding="utf-8")
    assert not report.problems and "AutoencoderKL, trained for 1\\n2 steps" in report.text()
    assert all(line.isprintable() and len(line) < 500 for line in report.text().split("\n"))


@pytest.mark.filterwarnings("ignore:weights")
def test_a_scale_of_latents_is_positive_or_absent(whole: Path) -> None:
    for scale in (0, -1.0, 0.0):
        before = edit(whole / "vae.yaml", latent_scale=scale)
        with pytest.raises(ValueError, match=r"vae.yaml'?: latent_scale: expected a positive number, got"):
            ldm.load(weights=whole)
        (whole / "vae.yaml").write_text(before, encoding="utf-8")
        card = edit(whole / "card.yaml", latent_scale=scale)
        with pytest.raises(ValueError, match="card.yaml': latent_scale: expected a positive number"):
            ldm.load(weights=whole)
        (whole / "card.yaml").write_text(card, encoding="utf-8")
    before = edit(whole / "vae.yaml", latent_scale=None)
    card = edit(whole / "card.yaml", latent_scale=0.25)
    assert ldm.load(weights=whole).latent_scale == 0.25  # that of the card
    (whole / "card.yaml").write_text(card, encoding="utf-8")
    assert ldm.load(weights=whole).latent_scale == 1.0
    (whole / "vae.yaml").write_text(before, encoding="utf-8")
    assert ldm.load(weights=whole).latent_scale == 0.5


def test_parts_that_do_not_fit_together_name_the_folder(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(whole, folder)
    card = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    card["text"]["layer"] = -9
    (folder / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^weights '.*other': layer: expected -\d to -1, got -9"):
        ldm.load(weights=folder)
