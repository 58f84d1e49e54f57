"""Commands that generate images from images: each calls its method, is replayable and checks its input."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.images.files import read_recipe

FAST = ["--steps", "2", "--dtype", "float32"]


@pytest.fixture(autouse=True, scope="module")
def work_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        ldm.save(tiny_model(), folder / "assets" / "emoji-ldm")
        patch.setattr("ldm.catalog.lookup.ASSETS", folder / "assets")
        patch.chdir(folder)
        rng = np.random.default_rng(0)
        for name in ("a.png", "b.png"):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(name)
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[8:20, 8:20] = 255
        Image.fromarray(mask).save("mask.png")
        Image.fromarray(mask * 0).save("black.png")
        (folder / "text.png").write_text("not an image", encoding="utf-8")
        yield


def pixels(path):
    return np.asarray(Image.open(path))


CASES = [
    (["image-to-image", "cat", "a.png", "--strength", "0.5"], "image_to_image", (32, 32)),
    (["image", "cat", "a.png", "--strength", "0.5"], "image_to_image", (32, 32)),
    (
        [
            "inpaint",
            "cat",
            "a.png",
            "mask.png",
            "--resample",
            "2",
            "--jump",
            "1",
            "--feather",
            "2",
            "--seam",
            "4",
        ],
        "inpaint",
        (32, 32),
    ),
    (["outpaint", "cat", "a.png", "--left", "8", "--bottom", "5"], "outpaint", (37, 40)),
    (["variations", "a.png", "--n", "2", "--strength", "0.5"], "variations", (32, 64)),
    (["vary", "a.png", "--n", "2", "--strength", "0.5"], "variations", (32, 64)),
    (["interpolate", "cat", "red apple", "--n", "3"], "interpolate", (64, 64)),
    (["interpolate", "1", "2", "--between", "seeds", "--n", "2", "--prompt", "cat"], "interpolate", (32, 64)),
    (["interpolate", "a.png", "b.png", "--between", "images", "--n", "2"], "interpolate", (32, 64)),
    (["interpolate", "a.png", "b.png", "--between", "pictures", "--n", "2"], "interpolate", (32, 64)),
    (["edit", "cat", "red apple", "--emphasis", "red=2", "--emphasis", "apple=0.5"], "edit", (32, 32)),
    (["edit", "cat", "red apple", "--image", "a.png", "--strength", "0.5", "--no-exact"], "edit", (32, 32)),
    (["reconstruct", "a.png", "--prompt", "cat"], "reconstruct", (32, 32)),
    (["upscale", "a.png", "--factor", "2", "--window", "32"], "upscale", (64, 64)),
]


def command_name(value):
    return value[0] if isinstance(value, list) else None


@pytest.mark.parametrize(("arguments", "task", "size"), CASES, ids=command_name)
def test_each_command_writes_an_image_with_its_recipe(arguments, task, size, capsys):
    assert main([*arguments, "-o", "out.png", *FAST]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == "out.png"
    assert pixels("out.png").shape == (*size, 3)
    assert read_recipe("out.png")["task"] == task


def test_a_command_writes_what_its_method_returns():
    assert main(["inpaint", "cat", "a.png", "mask.png", "-o", "in.png", "--seed", "3", *FAST]) == 0
    pipe = ldm.load("emoji-ldm", dtype="float32")
    made = pipe.inpaint("cat", "a.png", "mask.png", seed=3, steps=2, progress=False)
    assert (pixels("in.png") == made.numpy()[0]).all()
    known = pixels("mask.png") == 0
    assert (pixels("in.png")[known] == pixels("a.png")[known]).all()
    assert main(["edit", "red apple", "red cat", "--emphasis", "cat=3", "-o", "e.png", *FAST]) == 0
    assert (
        pixels("e.png")
        == pipe.edit("red apple", "red cat", emphasis={"cat": 3.0}, steps=2, progress=False).numpy()[0]
    ).all()


def test_a_size_that_does_not_fit_is_a_warning_on_standard_error(capsys):
    Image.fromarray(pixels("a.png")[:30, :29]).save("odd.png")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["image", "cat", "odd.png", "-o", "out.png", *FAST]) == 0
    assert "warning: 29×30 is not a multiple of 4: padded to 32×32" in capsys.readouterr().err
    assert pixels("out.png").shape == (30, 29, 3)


@pytest.mark.parametrize("arguments", [case[0] for case in CASES], ids=command_name)
def test_images_from_files_are_replayed_exactly(arguments, capsys):
    assert (
        main(
            [*arguments, "--seed" if "seeds" not in arguments else "--guidance", "3", "-o", "made.png", *FAST]
        )
        == 0
    )
    assert main(["replay", "made.png"]) == 0
    assert not capsys.readouterr().err
    assert (pixels("made.png") == pixels("made-replay.png")).all() and read_recipe("made.png") == read_recipe(
        "made-replay.png"
    )


def test_one_file_of_several_is_replayed_from_another_grid_and_convention():
    assert (
        main(
            [
                "vary",
                "a.png",
                "--n",
                "2",
                "--separate",
                "--convention",
                "k",
                "--spacing",
                "karras",
                "-o",
                "v.png",
                *FAST,
            ]
        )
        == 0
    )
    assert main(["replay", "v-1.png", "-o", "again.png"]) == 0
    assert (pixels("v-1.png") == pixels("again.png")).all() and (
        pixels("v-0.png") != pixels("again.png")
    ).any()


@pytest.mark.parametrize("changed", ["given.png", "hole.png"])
def test_a_file_that_is_absent_or_changed_is_refused(changed, capsys):
    for copy, source in (("given.png", "a.png"), ("hole.png", "mask.png")):
        shutil.copy(source, copy)
    assert main(["inpaint", "cat", "given.png", "hole.png", "-o", "in.png", *FAST]) == 0
    held = read_recipe("in.png")["arguments"]
    assert held["image"] == {
        "path": "given.png",
        "sha256": hashlib.sha256(Path("a.png").read_bytes()).hexdigest(),
    }
    capsys.readouterr()
    shutil.copy("b.png", changed)
    assert main(["replay", "in.png"]) == 2
    name = {"given.png": "image", "hole.png": "mask"}[changed]
    assert capsys.readouterr().err.startswith(
        f"error: {name}: {changed!r} is not the file that the image was made of"
    )
    Path(changed).unlink()
    assert main(["replay", "in.png", "-o", "none.png"]) == 2
    assert (
        f"error: {name}: no such file: {changed!r}" in capsys.readouterr().err
        and not Path("none.png").exists()
    )


def test_images_in_memory_are_not_replayed_and_the_recipe_says_so(capsys):
    pipe = ldm.load("emoji-ldm", dtype="float32")
    for given, kind in (
        (pixels("a.png"), "ndarray"),
        (torch.zeros(3, 32, 32), "Tensor"),
        (Image.open("a.png"), "PngImageFile"),
    ):
        made = pipe.image_to_image("cat", given, steps=2, progress=False)
        assert not made.recipe["replayable"] and "arguments" not in made.recipe
        made.save("memory.png")
        assert main(["replay", "memory.png"]) == 2
        assert (
            f"cannot be made again: its image was given as {kind}, which a recipe does not hold"
            in capsys.readouterr().err
        )
    hooked = pipe.image_to_image("cat", "a.png", steps=2, progress=False, on_step=lambda *_: None)
    assert not hooked.recipe["replayable"] and "on_step" in hooked.recipe["because"]


def test_a_recipe_calls_no_other_method(capsys):
    pipe = ldm.load("emoji-ldm", dtype="float32")
    made = pipe.image_to_image("cat", "a.png", steps=2, progress=False)
    replace(made, recipe={**made.recipe, "task": "requires_grad_", "arguments": {}}).save("odd.png")
    assert main(["replay", "odd.png"]) == 2 and "has no task of this name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inpaint", "cat", "a.png", "black.png"], "black everywhere"),
        (["inpaint", "cat", "absent.png", "mask.png"], "absent.png"),
        (["inpaint", "cat", "text.png", "mask.png"], "is not a readable image"),
        (["image", "cat", "a.png", "--strength", "2"], "strength: expected 0 to 1, got 2"),
        (["outpaint", "cat", "a.png"], "nothing to outpaint"),
        (
            ["outpaint", "cat", "a.png", "--left", "-3"],
            "left: expected a whole number of pixels, at least 0, got -3",
        ),
        (["vary", "a.png", "--n", "0"], "n: expected"),
        (
            ["interpolate", "one", "2", "--between", "seeds"],
            "A and B: expected seeds, whole numbers, got 'one' and '2'",
        ),
        (["edit", "cat", "apple", "--emphasis", "dog=2"], "no word 'dog'"),
        (["upscale", "a.png", "--factor", "1"], "factor: expected"),
        (["reconstruct", "a.png", "-o", "out.gif"], ".png, .jpg, .jpeg or .webp"),
        (["depth-to-image", "cat", "a.png", "b.png"], "no input channels for this task"),
        (["rerank", "cat"], "'emoji-ldm' has no rerank; its commands: generate, image-to-image, inpaint,"),
    ],
)
def test_wrong_input_is_one_line_on_standard_error(arguments, message, capsys):
    assert main([*arguments, *FAST] if "-o" in arguments else [*arguments, "-o", "none.png", *FAST]) == 2
    captured = capsys.readouterr()
    assert (
        message in captured.err
        and captured.err.startswith("error: ")
        and captured.err.count("\n") == 1
        and not captured.out
    )


def test_an_emphasis_is_a_word_and_a_number(capsys):
    assert main(["edit", "cat", "apple", "--emphasis", "red"]) == 2
    assert "'red': expected WORD=FACTOR, such as red=2" in capsys.readouterr().err
