"""Learning of an exemplar: what the denoiser needs is learned, and what is learned is what is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_exemplars import SIZE, tiny_exemplar_model
from tiny_latent_diffusion import tiny_model
from tiny_trainings import interrupted, run, write
from torch import Tensor

import ldm
from ldm.models.layout import ThingLayout, multiplied, place_exemplars
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run
from ldm.training.tuning.exemplar_image import MOVE_UNITS, LearnedExemplar, first_image

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a model and scenes of a green box on two backgrounds, and change to the folder above them."""
    monkeypatch.chdir(tmp_path)
    ldm.save(tiny_exemplar_model(), tmp_path / "model", dtype="float32")
    (tmp_path / "scenes").mkdir()
    for name, colour in COLOURS.items():
        image = np.full((SIZE, SIZE, 3), colour, np.uint8)
        image[4:12, 4:12] = (0, 200, 0)
        Image.fromarray(image).save(tmp_path / f"scenes/{name}.png")
        (tmp_path / f"scenes/{name}.txt").write_text(f"a zorb on a {name} background", encoding="utf-8")
    return tmp_path


def config(name: str, **changes: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": "scenes", "size": SIZE, "least": 8, "held_out": 0}
    made = {"part": "exemplar-image", "weights": "model", "thing": "zorb", "data": data}
    made |= {"run": run(name, steps=4), "diffusion": {"drop": 0.0}, **changes}
    made["run"]["optimizer"] |= {"lr": 0.05, "weight_decay": 0.0}
    return made


@torch.no_grad()
def loss_of(part: Any) -> float:
    return float(part.validate()["loss"])


def test_the_first_image_is_what_all_scenes_share() -> None:
    scenes = torch.zeros(2, 3, 8, 8)
    scenes[0, 0], scenes[1, 2] = 1, 1  # red and blue
    scenes[:, :, 2:6, 2:6] = torch.tensor([0.0, 0.8, 0.0])[:, None, None]
    places = torch.tensor([[0.5, 0.5, 1.0, 0.0]]).expand(2, -1)
    image = first_image(scenes, places, 8)
    assert image.shape == (4, 8, 8) and bool(((image > 0) & (image < 1)).all())
    torch.testing.assert_close(image[:3, 3, 3], torch.tensor([0.05, 0.8, 0.05]))
    assert float(image[3, 3, 3]) > 0.9 and float(image[3, 0, 0]) < 0.1
    half = first_image(scenes, torch.tensor([[0.5, 0.5, 0.5, 0.0]]).expand(2, -1), 8)  # the box fills it
    assert float(half[3, 1:-1, 1:-1].min()) > 0.9
    moved = first_image(scenes.roll((1, -1), (2, 3)), places + torch.tensor([-1 / 8, 1 / 8, 0, 0]), 8)
    torch.testing.assert_close(moved[:, 2:6, 2:6], image[:, 2:6, 2:6])


def test_a_move_of_one_is_the_stated_unit() -> None:
    places = torch.tensor([[0.4, 0.6, 0.5, 3.0], [0.5, 0.5, 1.0, 0.0]])
    net = LearnedExemplar(torch.full((4, 8, 8), 0.5), places)
    assert torch.equal(net.layout([1, 0]).places[:, 0], places[[1, 0]])
    with torch.no_grad():
        net.moves[0] = 1
    wanted = [0.4 + MOVE_UNITS[0], 0.6 + MOVE_UNITS[1], 0.5 * np.exp(MOVE_UNITS[2]), 3 + MOVE_UNITS[3]]
    torch.testing.assert_close(net.layout([0]).places[0, 0], torch.tensor(wanted, dtype=torch.float32))


def test_a_scene_is_shown_the_exemplar_and_an_empty_text_nothing(work: Path) -> None:
    part = open_run(write(config("zorb"), work / "zorb.yaml")).part
    samples = part.images.plain(2, seed=0)
    texts = part.images.describe(samples)
    cond = part.cond([texts[0], ""], samples)
    layout = part.model.layout(part.scenes.rows_of(samples[:1]))
    wanted = place_exemplars(multiplied(part.model.pixels())[None, None], layout, (SIZE, SIZE))
    torch.testing.assert_close(cond.exemplars[:1, :1], wanted)
    assert not bool(cond.exemplars[1].any()) and not bool(cond.exemplars[:, 1:].any())
    assert torch.equal(cond.context[0], part.text.read(texts[0]).text.context[0])
    part.denoiser.predict(torch.randn(2, 6, 4, 4), torch.tensor([400.0, 10.0]), cond).sum().backward()
    assert bool(part.model.image.grad.any()) and bool(part.model.moves.grad.any())
    assert all(p.grad is None for p in part.pipe.parameters())


def test_the_loss_falls_and_the_model_stays(work: Path) -> None:
    made = config("zorb")
    made["run"] |= {"steps": 40, "ema": 0.5}
    made["run"] |= dict.fromkeys(("validate_every", "sample_every", "checkpoint_every"), 40)
    opened = open_run(write(made, work / "zorb.yaml"))
    before = loss_of(opened.part)
    weights = {name: value.clone() for name, value in opened.part.pipe.state_dict().items()}
    opened.train(progress=False)
    assert loss_of(opened.part) < 0.9 * before
    assert all(torch.equal(value, weights[name]) for name, value in opened.part.pipe.state_dict().items())


def test_what_is_exported_is_what_was_learned(work: Path) -> None:
    folder = train_recipe(write(config("zorb"), work / "zorb.yaml"), progress=False)
    pipe = ldm.load(weights="model", device="cpu", dtype="float32")
    pipe.exemplars.add("zorb", folder / "zorb.png")
    mention = pipe.text.read("a zorb").alternatives[0].mentions[0]
    added = pipe.text.library.pixels(pipe.text.library.choose(mention, 0, 0))
    state = torch.load(work / "runs/zorb/checkpoint.pt", weights_only=True)["ema"]
    assert float((added - state["image"].sigmoid()).abs().max()) < 0.51 / 255
    assert (folder / "zorb.yaml").is_file()


def test_an_interrupted_training_resumes_bit_identically(work: Path) -> None:
    whole, parts = interrupted(config, work)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thing": " "}, "thing: expected letters or digits"),
        ({"thing": "dog"}, "expected 'dog' and no other thing in every caption, got 'a zorb"),
        ({"data": {"held_out": 0.5}}, "data: held_out 0.5.*expected 0"),
        ({"data": {"mirror": 0.5}}, "mirror 0.5"),
        ({"data": {"crop": "random"}}, "crop 'random'"),
        ({"run": run("bad", distributed="fsdp")}, "expected 'ddp'"),
    ],
)
def test_what_cannot_be_learned_is_named(work: Path, changes: dict[str, Any], message: str) -> None:
    made = config("bad")
    changed = {k: {**made[k], **v} if k == "data" else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        open_run(write({**made, **changed}, work / "bad.yaml"))


def test_a_caption_with_another_thing_is_refused(work: Path) -> None:
    (work / "scenes/red.txt").write_text("a zorb and a dog", encoding="utf-8")
    with pytest.raises(ValueError, match="'a zorb and a dog'"):
        open_run(write(config("bad"), work / "bad.yaml"))


def test_a_model_without_exemplars_is_refused(work: Path) -> None:
    ldm.save(tiny_model(), work / "plain", dtype="float32")
    with pytest.raises(ValueError, match="has no exemplars, expected part: textual-inversion"):
        open_run(write(config("bad", weights="plain"), work / "bad.yaml"))


def test_layouts_of_one_instance_are_drawn_as_others() -> None:
    """The layout of a scene is one that `place_exemplars` takes."""
    net = LearnedExemplar(torch.full((4, 8, 8), 0.5), torch.tensor([[0.5, 0.5, 1.0, 0.0]]))
    layout = net.layout([0])
    assert isinstance(layout, ThingLayout) and tuple(layout.places.shape) == (1, 1, 4)
    drawn: Tensor = place_exemplars(net.pixels()[None, None], layout, (8, 8))
    torch.testing.assert_close(drawn[0, 0], net.pixels())
