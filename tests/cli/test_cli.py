"""The command line, in this process on a tiny model: what it writes, what it refuses, and replay."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.images.files import read_recipe


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    ldm.save(tiny_model(), tmp_path / "assets" / "emoji-ldm")
    monkeypatch.setattr("ldm.catalog.lookup.ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_prompt_becomes_a_png_with_its_recipe(capsys):
    assert main(["a red apple", "-o", "apple.png", "--seed", "3", "--steps", "5", "--size", "32x48"]) == 0
    assert capsys.readouterr().out.strip() == "apple.png"
    recipe = read_recipe("apple.png")
    assert pixels("apple.png").shape == (48, 32, 3)
    assert (recipe["prompt"], recipe["seed"], recipe["steps"], recipe["model"]) == (
        "a red apple",
        [3],
        5,
        "emoji-ldm",
    )
    assert recipe["weights"] and recipe["versions"]["torch"]


def test_several_pictures_make_a_grid_or_files():
    assert main(["cat", "-o", "a.png", "--n", "4"]) == 0
    assert pixels("a.png").shape == (64, 64, 3)
    assert main(["cat", "-o", "b.png", "--n", "4", "--separate"]) == 0
    assert (pixels("b-3.png") == pixels("a.png")[32:, 32:]).all()


@pytest.mark.parametrize(
    "options",
    [[], ["--sampler", "ddpm"], "--sampler ddim --dtype float32 --negative apple --guidance 1.5".split()],
)
def test_replay_makes_the_same_bits(options):
    assert main(["a red apple", "-o", "a.png", "--n", "2", "--seed", "5", *options]) == 0
    assert main(["replay", "a.png"]) == 0
    assert (pixels("a.png") == pixels("a-replay.png")).all()
    assert read_recipe("a.png") == read_recipe("a-replay.png")


def test_replay_of_one_file_of_several():
    assert main(["cat", "-o", "a.png", "--n", "3", "--separate"]) == 0
    assert main(["replay", "a-1.png", "-o", "again.png"]) == 0
    assert (pixels("a-1.png") == pixels("again.png")).all()


def test_replay_refuses_other_weights(tmp_path, capsys):
    import torch

    assert main(["cat", "-o", "a.png"]) == 0
    other = tiny_model()
    with torch.no_grad():
        other.denoiser.net.conv_in.bias.add_(1)
    ldm.save(other, tmp_path / "assets" / "emoji-ldm")
    assert main(["replay", "a.png"]) == 2 and "other weights" in capsys.readouterr().err


def test_an_empty_prompt_works_and_a_prompt_may_be_a_commands_word():
    assert main(["", "-o", "empty.png"]) == 0
    assert main(["--", "train"]) == 0


def test_unknown_words_are_named_on_standard_error(capsys):
    assert main(["purple zeppelin", "-o", "a.png"]) == 0
    assert "warning: emoji-ldm has never seen 'purple', 'zeppelin'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat", "-o", "none/a.png"], "no folder 'none'"),
        (["cat", "-o", "a.jpg"], ".png"),
        (["cat", "--n", "0"], "n: expected a number of pictures of at least 1, got 0"),
        (["cat", "--steps", "0"], "from 1 to 1000"),
        (["cat", "--steps", "1001"], "from 1 to 1000"),
        (["cat", "--size", "33"], "expected a multiple of 4"),
        (["cat", "--sampler", "dimm"], "did you mean 'ddim'"),
        (["cat", "--model", "emoji"], "did you mean 'emoji-ldm'"),
        (["cat", "--weights", "nowhere"], "nowhere"),
        (["cat", "--model", "taesd", "--weights", "random"], "'taesd' makes no pictures of texts"),
        (["cat", "--dtype", "int3"], "dtype 'int3'"),
        (["replay", "absent.png"], "absent.png"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["inspect", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_wrong_input_is_one_line_on_standard_error_and_writes_nothing(arguments, message, capsys, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (
        message in captured.err
        and captured.err.startswith("error: ")
        and captured.err.count("\n") == 1
        and not captured.out
    )
    assert set(tmp_path.rglob("*")) == before


def test_an_unwritable_output_is_found_out_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("ldm.registry.loading.load", lambda *_, **__: pytest.fail("loaded"))
    assert main(["cat", "-o", "none/a.png"]) == 2


def test_models_grid_and_inspect_tell(capsys, tmp_path):
    assert main(["models"]) == 0 and main(["grid", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "\nemoji-ldm: " in out and "dpmpp_2m: 3 steps, 3 evaluations" in out
    assert main(["inspect", str(tmp_path / "assets" / "emoji-ldm" / "unet.safetensors")]) == 0
    assert "float32" in capsys.readouterr().out
