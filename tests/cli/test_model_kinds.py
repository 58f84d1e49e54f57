"""The commands that only some models have, on models of reduced width with random weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reduced_families
from PIL import Image
from tiny_unclip import tiny_karlo

import ldm
from ldm.__main__ import main
from ldm.images.files import read_recipe

CASES = [
    ("sd-v2-depth", ["depth-to-image", "a cat", "a.png", "depth.png", "--strength", "0.5"]),
    ("instruct-pix2pix", ["instruct", "make it winter", "a.png", "--image-guidance", "1.2"]),
    ("ldm-cin256-v2", ["class-to-image", "7", "--n", "2"]),
    ("ldm-celebahq", ["unconditional", "--n", "2"]),
    ("tiny-unclip", ["text-difference", "a.png", "a photo", "a drawing", "--n", "2", "--most", "0.4"]),
    ("tiny-unclip", ["text-difference", "a.png", "a photo", "a drawing", "--n", "2", "--no-invert"]),
    ("tiny-unclip", ["rerank", "a cat", "--of", "3", "--keep", "2"]),
]


@pytest.fixture(scope="module", autouse=True)
def work_folder(tmp_path_factory):
    """Work in a folder with an image, a depth map and an embedded unCLIP model."""
    folder = tmp_path_factory.mktemp("kinds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("ldm.catalog.lookup.ASSETS", folder / "assets")
        pipe = tiny_karlo()
        pipe.card = replace(pipe.card, name="tiny-unclip", family="unclip", networks=None)
        ldm.save(pipe, folder / "assets" / "tiny-unclip")
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save("a.png")
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save("depth.png")
        yield folder


@pytest.mark.parametrize(
    ("model", "arguments"), CASES, ids=lambda value: value[0] if isinstance(value, list) else None
)
def test_a_command_calls_the_method_and_is_replayable(model, arguments, work_folder, capsys):
    options = ["--steps", "2", "--dtype", "float32", "--sampler", "ddim", "--seed", "3", "-o", "out.png"]
    weights = []
    if model != "tiny-unclip":
        model, weights = reduced_families.register(model, work_folder).name, ["--weights", "random"]
    assert main([*arguments, *options, "--model", model, *weights]) == 0, capsys.readouterr().err
    recipe = read_recipe("out.png")
    made = np.asarray(Image.open("out.png"))
    assert recipe["model"] == model
    if arguments[0] == "rerank":
        assert recipe["reranked"]["of"] == 3 and not recipe["replayable"]
        return
    assert recipe["task"] == arguments[0].replace("-", "_")
    assert main(["replay", "out.png", *weights]) == 0, capsys.readouterr().err
    assert (np.asarray(Image.open("out-replay.png")) == made).all()
