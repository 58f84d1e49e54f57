"""Data sets with few images: every part trains on them, or refuses them before any training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_data_set
from tiny_trainings import configs, unclip_configs, write

from ldm.data import EmojiData, ImageIndex, ImageRecord
from ldm.training.loop import Run
from ldm.training.recipe import find_stage, train_recipe

Choose = Callable[[ImageRecord], bool]
PLAIN = dict.fromkeys(("two", "count", "small", "placed", "colour", "background"), 0.0)
HELD_OUT = {"vae", "prior", "prior-ar", "decoder", "decoder-begun", "upsampler"}
ORDER = ("vae", "clip", "draft", "unet", "clip-text", "prior", "prior-ar", "decoder")


def write_part_of(data: EmojiData, folder: Path, chosen: Choose, held_out: Choose) -> Path:
    """Write the rows that `chosen` returns true for, and hold out those of `held_out`."""
    rows = [i for i, row in enumerate(data.index) if chosen(row)]
    index = ImageIndex(replace(data.index[i], held_out=held_out(data.index[i])) for i in rows)
    folder.mkdir()
    return write_data_set(EmojiData(images=data.images[rows], index=index, manifest={}), folder)


def made_for(folder: Path, **mix: float) -> dict[str, dict[str, Any]]:
    """Return the configurations of all parts, with one step and another mix."""
    made = {**configs(folder), **unclip_configs(folder)}
    made["unet"]["text"] = {"folder": "runs/draft/export"}
    for config in made.values():
        config["run"] = {**config["run"], "steps": 1, "validate_every": 1, "sample_every": 1}
        config["data"] = {**config["data"], "mix": {**config["data"]["mix"], **mix}}
    return made


def train(config: dict[str, Any], name: str) -> None:
    run = find_stage(write(config, Path(f"{name}.yaml"))).open("cpu")
    run.train(progress=False)
    assert run.finished
    run.export(Path(f"runs/{name}/export"))


def test_one_style_with_one_image_held_out(drawn: EmojiData, tmp_path: Path, monkeypatch: Any) -> None:
    folder = write_part_of(
        drawn, tmp_path / "data", lambda row: row.style == "fluent", lambda row: row.name == "ring"
    )
    monkeypatch.chdir(tmp_path)
    made = made_for(folder)
    for name in (*ORDER, "upsampler"):
        train(made[name], name)


def test_one_training_image(drawn: EmojiData, tmp_path: Path, monkeypatch: Any) -> None:
    """Two things and a spread need two images; what needs neither trains, validates and shows samples."""
    folder = write_part_of(
        drawn, tmp_path / "data", lambda row: row.name == "ring", lambda row: row.style != "noto"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.mix of .*: two 0\.2: expected 0, as the 1 training images"):
        find_stage(write(made_for(folder)["vae"], Path("vae.yaml"))).open("cpu")
    made = made_for(folder, two=0.0)
    for name in (*ORDER, "upsampler"):
        train(made[name], name)
    plain = made_for(folder, **PLAIN)
    with pytest.raises(ValueError, match="expected 4 components that vary, got 0"):
        find_stage(write({**plain["prior-ar"], "variants": 0}, Path("prior-ar.yaml"))).open("cpu")


@pytest.mark.parametrize("name", ORDER)
def test_without_images_for_training_or_validation(
    drawn: EmojiData, tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    all_held = write_part_of(drawn, tmp_path / "held", lambda row: True, lambda row: True)
    with pytest.raises(ValueError, match=r"data\.folder '.*held': all 18 images are held out"):
        find_stage(write(made_for(all_held)[name], Path("run.yaml"))).open("cpu")
    none_held = write_part_of(drawn, tmp_path / "none", lambda row: True, lambda row: False)
    if name in HELD_OUT:
        with pytest.raises(
            ValueError, match=r"none of the 18 images is held out, .*: set \"held_out\" to true"
        ):
            find_stage(write(made_for(none_held)[name], Path("run.yaml"))).open("cpu")
    elif name == "clip":
        train(made_for(none_held)[name], name)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_until_is_a_step_everywhere(folder: Path, tmp_path: Path, monkeypatch: Any, value: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(configs(folder)["vae"], Path("vae.yaml"))
    monkeypatch.setattr(Run, "__init__", lambda *_: pytest.fail("opened"))
    message = f"until: expected a whole number of at least 1, got {value}"
    for attempt in (
        lambda: train_recipe(path, until=value),
        lambda: train_recipe(tmp_path, until=value),
        lambda: find_stage(path).train(until=value),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", [*ORDER, "upsampler"])
def test_numbers_below_their_range_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    config = made_for(folder)[name]
    wrong: list[tuple[str, str, Any]] = [
        *(
            ("run", key, value)
            for key, value in (("steps", 0), ("batch", -1), ("seed", -1), ("log_every", 0))
        ),
        *(("data", key, value) for key, value in (("size", 0), ("size", -8))),
        *(("", "variants", -1) for _ in range("variants" in config)),
    ]
    for section, key, value in wrong:
        changed = {**config, **({section: {**config[section], key: value}} if section else {key: value})}
        with pytest.raises(ValueError, match=f"{key}: expected"):
            find_stage(write(changed, tmp_path / "wrong.yaml"))
