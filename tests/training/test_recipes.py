"""Recipes: training from scratch with interruptions, the bundled model, and errors before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainings import (
    latent_recipe,
    latent_stages,
    unclip_recipe,
    unclip_stages,
    write,
    write_recipe,
)

import ldm
from ldm.__main__ import main
from ldm.support.config import read_yaml
from ldm.training.config_file import build_stage_config, read_stage_file
from ldm.training.loop import Run
from ldm.training.recipe import open_recipe, train_recipe
from ldm.training.run import open_run
from ldm.training.stages import get_dotted, set_dotted

SMALL = {"sampler": "ddim", "steps": 2, "guidance": 2.0, "height": 32, "width": 32}
LARGE = {**SMALL, "height": 64, "width": 64}
POOLED = {"layer": -1, "final_norm": True, "length": None, "pad": 0, "masked": True, "pooled": True}
LATENT_CARD = {
    "base": "emoji-ldm",
    "name": "tiny-ldm",
    "prediction": "v",
    "text": POOLED,
    "defaults": SMALL,
}


@pytest.fixture
def recipe(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder that holds the drawn data set, and return that of a tiny recipe in it."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(Path("configs/tiny-ldm"), latent_recipe(), latent_stages(folder), LATENT_CARD)


def interrupt_each_stage(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Raise KeyboardInterrupt once in each run that reaches a step; the list names the interrupted runs."""
    take_step = Run._one_step
    interrupted: list[str] = []

    def one_step(run: Run) -> dict[str, torch.Tensor]:
        if run.step == step and run.config.name not in interrupted:
            interrupted.append(run.config.name)
            raise KeyboardInterrupt
        return take_step(run)

    monkeypatch.setattr(Run, "_one_step", one_step)
    return interrupted


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {**state["model"], **{f"ema.{key}": value for key, value in state["ema"].items()}}


def test_a_recipe_interrupted_in_each_stage_gives_the_same_model(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_recipe(recipe, runs="whole", progress=False)
    with monkeypatch.context() as patch:
        interrupted = interrupt_each_stage(patch, step=3)  # checkpoints are at 2 and 4
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                train_recipe(recipe, runs="halves", progress=False)
        resumed = train_recipe(recipe / "recipe.yaml", runs="halves", progress=False)
    assert interrupted == ["autoencoder", "clip", "draft", "unet"]
    assert whole == Path("whole/tiny-ldm/model") and resumed == Path("halves/tiny-ldm/model")
    for name in open_recipe(recipe).stages:
        expected, got = (checkpoint(Path(runs, "tiny-ldm", name)) for runs in ("whole", "halves"))
        assert expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in expected), name
    for path in whole.iterdir():
        if path.suffix in (".safetensors", ".json"):
            assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name
    assert {path.name for path in whole.glob("*.jsonl")} == {
        f"{name}.jsonl" for name in open_recipe(recipe).stages
    }
    images = ldm.load(weights=resumed).text_to_image("cat face on a blue background", progress=False)
    assert images.tensor.shape == (1, 3, 32, 32) and images.tensor.isfinite().all()


def test_finished_stages_are_skipped_and_changes_of_them_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    assert train_recipe(recipe, until="clip", progress=False, report=lines.append) is None
    assert [line.partition(":")[0] for line in lines[1:]] == ["stage autoencoder", "stage clip"]
    assert train_recipe(recipe, until=1, progress=False, report=lines.append) is None
    assert lines[-1] == "stopped in stage draft: at step 1 of 6"
    lines.clear()
    train_recipe(recipe, dry_run=True, report=lines.append)
    assert len(lines) == 1 and [line.split()[-1] for line in lines[0].splitlines()[1:3]] == ["finished"] * 2
    assert "0.5 hours (0.3 left) on any machine" in lines[0] and "at step 1 of 6" in lines[0]

    def refused(name: str, key: str, value: object, message: str) -> None:
        path = recipe / f"{name}.yaml"
        before = path.read_text(encoding="utf-8")
        config = read_yaml(path)
        set_dotted(config, key, value)
        write(config, path)
        with pytest.raises(ValueError, match=message):
            train_recipe(recipe, progress=False)
        path.write_text(before, encoding="utf-8")

    monkeypatch.setattr(Run, "train", lambda *_, **__: pytest.fail("training began"))
    refused("clip", "run.steps", 7, "'clip' was finished with a configuration that differs in run.steps")
    refused("autoencoder", "loss.kl", 0.5, "'autoencoder' was finished .* differs in loss.kl: restore it, or")
    refused("draft", "model.width", 24, "'draft' was begun with a configuration that differs in model.width")
    about = Path("runs/tiny-ldm/clip/export/text.yaml")
    record = Path("runs/tiny-ldm/clip/stage.json")
    sha256 = read_yaml(about)["sha256"]
    for path in (about, record):
        path.write_text(path.read_text(encoding="utf-8").replace(sha256, "f" * 64), encoding="utf-8")
    with pytest.raises(ValueError, match="'draft' was begun with another export of 'clip': remove"):
        train_recipe(recipe, progress=False)
    for damaged in ("{", "[]", "{}", '{"config": 1, "reads": {}, "exports": null}', '{"a": 1, "a": 2}'):
        record.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=r"clip/stage\.json'?(:| is not)"):
            train_recipe(recipe, progress=False)


def test_a_stage_file_of_a_recipe_is_trained_alone(recipe: Path) -> None:
    assert train_recipe(recipe / "autoencoder.yaml", progress=False) == Path(
        "runs/tiny-ldm/autoencoder/export"
    )
    assert open_recipe(recipe).stages["autoencoder"].finished
    with pytest.raises(ValueError, match="'draft' reads 'clip', which is not finished"):
        train_recipe(recipe / "draft.yaml", progress=False)
    with pytest.raises(ValueError, match="expected a step for a single stage, got 'clip'"):
        train_recipe(recipe / "clip.yaml", until="clip")
    assert open_run(recipe / "clip.yaml").folder == Path("runs/tiny-ldm/clip")


def test_the_command_prints_the_plan_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny-ldm: 4 stages, about 0.5 hours (0.5 left) on any machine"
    assert lines[1] == "  autoencoder   0.1 h  not started" and lines[-1] == "  model: runs/tiny-ldm/model"
    assert not Path("runs").exists()
    assert main(["train", str(recipe), "--until", "autoencoder"]) == 0
    assert capsys.readouterr().out.splitlines() == [*lines, "stage autoencoder: not started"]
    assert main(["train", str(recipe), "--until", "draught"]) == 2
    assert "did you mean 'draft'" in capsys.readouterr().err


def test_a_recipe_that_shares_stages_of_another_ends_in_an_unclip_model(recipe: Path, folder: Path) -> None:
    embedded = read_yaml(Path(ldm.__file__).parent / "assets" / "emoji-unclip" / "card.yaml")
    stage_cards = {
        "prior": {**embedded["prior"], "defaults": SMALL},
        "decoder": {**embedded["decoder"], "prediction": "v", "defaults": SMALL},
        "upsamplers": [{**embedded["upsamplers"][0], "residual": None, "defaults": LARGE}],
    }
    card = {**embedded, "parts": {}, "name": "tiny-unclip", "text": {**embedded["text"], "length": 24}}
    shared = write_recipe(
        Path("configs/tiny-unclip"), unclip_recipe(), unclip_stages(folder), {**card, **stage_cards}
    )
    model = None
    for _ in range(9):  # each call stops in the next stage
        assert model is None
        model = train_recipe(shared, until=1, progress=False)
    assert model == Path("runs/tiny-unclip/model")
    assert {path.name for path in Path("runs").iterdir()} == {"latents", "tiny-ldm", "tiny-unclip"}
    assert (Path("runs/tiny-ldm/unet") / "stage.json").is_file()
    pipe = ldm.load(weights=model)
    assert pipe.card.clip.startswith("emoji-clip/") and pipe.card.clip != embedded["clip"]
    assert pipe.text_to_image("ring", n=1, progress=False).tensor.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stages", [{"stage": "decoder", "hours": 1.0}], "stage 'decoder': no such file: .*decoder.yaml"),
        (
            "stages",
            [{"stage": "../none/clip", "hours": 1.0}],
            "tiny-ldm/recipe.yaml': no such configuration file: '.*none/recipe.yaml'",
        ),
        ("stages.2.reads.vae", "unet", "'draft' reads 'unet': expected a stage listed before it"),
        ("stages.2.reads.vae", "draft", "'draft' reads 'draft': expected a stage listed before it"),
        ("stages.2.reads.vae", "autoencodr", "no such stage; did you mean 'autoencoder'"),
        ("stages.2.reads.vae", "clip", "reads 'clip' as vae: .*exports vae, it exports text, vision"),
        ("stages.2.reads", {"vea": "autoencoder"}, "unknown key 'vea'; did you mean 'vae'"),
        ("stages.2.reads", {"vae": "autoencoder"}, "missing key 'text'"),
        ("stages.2.reads.model", "clip", "'draft' reads 'clip' as model: .* but the stage sets it"),
        ("stages.1.stage", "autoencoder", "'autoencoder': expected another name"),
        ("stages.0.hours", None, "'autoencoder': missing key 'hours'"),
        ("stages.0.optional", True, "'draft' reads 'autoencoder': expected a stage that is not optional"),
        ("stages.0.hour", 1.0, "unknown key 'hour'; did you mean 'hours'"),
        ("stages.0.stage", "../tiny-ldm/vae", "not listed in"),
        ("bundle.parts.vae", "vae", "bundle.parts.vae: stage 'vae'"),
        ("bundle.parts.vae", "clip", "stage 'clip' exports text, vision, not vae"),
        ("bundle.parts", {"vea": "autoencoder"}, "bundle.parts: 'vea'; did you mean 'vae'"),
        ("name", None, "name"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_work(
    recipe: Path, key: str, value: object, message: str
) -> None:
    file: dict[str, Any] = read_yaml(recipe / "recipe.yaml")
    *path, last = key.split(".")
    target: Any = file
    for part in path:
        target = target[int(part)] if part.isdigit() else target[part]
    target[last] = value
    write(file, recipe / "recipe.yaml")
    with pytest.raises(ValueError, match=message):
        train_recipe(recipe)
    assert not Path("runs").exists()


def test_until_names_a_stage_of_the_recipe(recipe: Path) -> None:
    with pytest.raises(ValueError, match="until: stage 'drafts'; did you mean 'draft'"):
        train_recipe(recipe, until="drafts")


def test_a_base_is_merged_key_by_key_and_cycles_are_refused(tmp_path: Path) -> None:
    write({"run": {"steps": 2, "batch": 4}, "data": {"size": 32}, "tags": [1, 2]}, tmp_path / "base.yaml")
    write({"base": "base.yaml", "run": {"steps": 9}, "tags": [3]}, tmp_path / "stage.yaml")
    expected = {"run": {"name": "stage", "steps": 9, "batch": 4}, "data": {"size": 32}, "tags": [3]}
    assert read_stage_file(tmp_path / "stage.yaml") == expected
    write({"base": "stage.yaml", "data": {"size": None}}, tmp_path / "third.yaml")
    assert get_dotted(read_stage_file(tmp_path / "third.yaml"), "run.name") == "third"
    write({"base": "third.yaml"}, tmp_path / "base.yaml")
    with pytest.raises(ValueError, match=r"a cycle of files: .*stage\.yaml -> .*base\.yaml -> .*third\.yaml"):
        read_stage_file(tmp_path / "stage.yaml")
    write({"base": ["stage.yaml"]}, tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="base: expected the relative path"):
        read_stage_file(tmp_path / "list.yaml")
    write({"base": "nowhere.yaml"}, tmp_path / "lost.yaml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        read_stage_file(tmp_path / "lost.yaml")


@pytest.mark.parametrize("part", ["vea", ["vae"], {"vae": 1}, None, 5])
def test_a_part_of_another_type_is_refused_by_name(tmp_path: Path, part: object) -> None:
    with pytest.raises(ValueError, match=r"a\.yaml'?: part .*Choices: .*vae"):
        build_stage_config({"part": part}, tmp_path / "a.yaml")
