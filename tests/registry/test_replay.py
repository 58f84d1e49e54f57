"""A recipe names every file and setting that its images depend on, and replay compares all of them."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.catalog.cards import Defaults
from ldm.images.files import read_recipe, write_image
from ldm.models.clip.config import VisionConfig
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.pipelines.replayable import FILE_ARGUMENTS
from ldm.registry.replay_options import LIMITS, check_limits
from ldm.registry.replaying import RecipeFacts, replay
from ldm.weights.formats.safetensors import sha256

FAST: dict[str, Any] = {"steps": 2, "progress": False}


@pytest.fixture(autouse=True, scope="module")
def work_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        ldm.save(tiny_model(), folder / "assets" / "emoji-ldm")
        patch.setattr("ldm.catalog.lookup.ASSETS", folder / "assets")
        patch.chdir(folder)
        rng = np.random.default_rng(0)
        for name in ("a.png", "b.png"):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(name)
        yield


@pytest.fixture
def pipe() -> Any:
    return ldm.load(device="cpu", dtype="float32")


def plain(recipe: Any) -> dict[str, Any]:
    """Return a recipe as it is in a file."""
    result: dict[str, Any] = json.loads(json.dumps(recipe))
    return result


def test_parameters_of_16_bits_that_were_widened_are_widened_again(monkeypatch):
    monkeypatch.setattr("ldm.speed.widening.fast_dtype", lambda device: torch.float32)
    narrow = ldm.optimize(ldm.load(device="cpu", dtype="bfloat16"))
    images = narrow.text_to_image("a red apple", seed=1, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = replay(plain(images.recipe))
    assert torch.equal(again.tensor, images.tensor) and again.recipe["computed_in"] == "float32"


def of_file(images: Any, path: str = "made.png") -> dict[str, Any]:
    images.save(path)
    return read_recipe(path)


# What a recipe names


@pytest.mark.parametrize("part", ["unet", "vae", "text", "draft", "vocabulary.json", "card"])
def test_everything_that_decides_the_image_is_named_and_compared(pipe, tmp_path, part):
    recipe = of_file(pipe.text_to_image("a red apple", **FAST))
    assert {"unet", "vae", "text", "draft", "vocabulary.json", "card"} == recipe["weights"].keys()
    again = replay(recipe)
    assert torch.equal(again.tensor, pipe.text_to_image("a red apple", **FAST).tensor)
    other = tiny_model()
    if part == "vocabulary.json":
        other.text.known_words = frozenset(["red"])
    elif part == "card":
        other.card = replace(other.card, defaults=replace(other.card.defaults, guidance=5.0))
    else:
        next(other.networks()[part].parameters()).data.flatten()[0] += 1
    ldm.save(other, tmp_path / "other")
    with pytest.raises(
        ValueError, match=rf"other weights of 'emoji-ldm': {part} \(sha256 '{recipe['weights'][part]}'"
    ):
        replay(recipe, weights=tmp_path / "other")


def test_a_summary_or_another_place_changes_nothing(pipe, tmp_path):
    recipe = of_file(pipe.text_to_image("cat", **FAST))
    other = tiny_model()
    other.card = replace(other.card, summary="another text", licence="MIT")
    ldm.save(other, tmp_path / "other", note="a fact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replay(recipe, weights=tmp_path / "other")


def test_a_recipe_of_an_earlier_version_is_followed_with_a_note(pipe):
    images = pipe.text_to_image("a red apple", **FAST)
    old = plain(images.recipe)
    old["weights"] = {name: old["weights"][name] for name in ("vae", "unet")}
    with pytest.warns(UserWarning, match="card, draft, text, vocabulary.json cannot be compared") as caught:
        assert torch.equal(replay(old).tensor, images.tensor)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="torch '1.0' then"):
        replay({**old, "weights": images.recipe["weights"], "versions": {**old["versions"], "torch": "1.0"}})


def test_the_pixels_are_compared(pipe):
    recipe = of_file(pipe.text_to_image("a red apple", n=3, **FAST))
    assert len(recipe["pixels"]) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replay({**recipe, "versions": {**recipe["versions"], "torch": "1.0"}})  # as the pixels are the same
    pipe.denoiser.net.conv_in.weight.data.add_(0.1)  # which no hash of a file tells
    changed = of_file(pipe.text_to_image("a red apple", n=3, **FAST))
    with pytest.warns(
        UserWarning, match="the pixels are not those of the image: the weights were changed in memory"
    ):
        replay(changed)
    images = ldm.load(device="cpu", dtype="float32").text_to_image("cat", n=3, **FAST)
    paths = images.save("each.png", separate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(replay(read_recipe(paths[1])).tensor, images.tensor[1:2])


def test_options_of_load_that_decide_the_weights_are_named_and_followed(tmp_path):
    ldm.save(tiny_model(), tmp_path / "model")
    options = {"weights": tmp_path / "model", "device": "cpu", "dtype": "float32"}
    eps = ldm.load(prediction="eps", **options)
    made = eps.text_to_image("cat", **FAST)
    assert made.recipe["loaded"] == {"prediction": "eps"}
    assert not torch.equal(made.tensor, ldm.load(**options).text_to_image("cat", **FAST).tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(replay(of_file(made), weights=tmp_path / "model").tensor, made.tensor)
    with pytest.raises(ValueError, match="other weights of 'emoji-ldm': card"):
        replay({**plain(made.recipe), "loaded": {}}, weights=tmp_path / "model")


def test_a_random_seed_is_held(pipe):
    for made in (
        pipe.text_to_image("cat", seed=None, **FAST),
        pipe.image_to_image("cat", "a.png", seed=None, **FAST),
        pipe.interpolate("cat", "apple", n=2, seed=None, **FAST),
    ):
        assert torch.equal(replay(of_file(made)).tensor, made.tensor)


def test_a_safety_checker_that_makes_images_black_is_named(pipe, tmp_path, monkeypatch):
    config = SafetyConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=32, layers=1, heads=2, embed_dim=8)
    )
    checker = SafetyChecker(config, black=True)
    checker.concept_embeds_weights.data.fill_(-2.0)  # flags every image
    checker.origin = {"safety.safetensors": "0" * 64}
    pipe.safety = checker
    made = pipe.text_to_image("cat", **FAST)
    recipe = of_file(made)
    assert recipe["weights"]["safety/safety.safetensors"] == "0" * 64 and not made.tensor.any()
    with pytest.raises(ValueError, match="a safety checker that makes images black: pass safety=PATH"):
        replay(recipe)
    monkeypatch.setattr("ldm.registry.loading.load_safety", lambda *_, **__: copy.deepcopy(checker))
    assert not replay(recipe, safety="safety.safetensors").tensor.any()
    checker.origin = {"safety.safetensors": "1" * 64}
    with pytest.raises(ValueError, match=r"other weights of 'emoji-ldm': safety/safety\.safetensors"):
        replay(recipe, safety="safety.safetensors")
    checker.origin = {}
    assert not pipe.text_to_image("cat", **FAST).recipe["replayable"]
    checker.black = False  # the pixels do not depend on it
    assert replay(of_file(pipe.text_to_image("cat", **FAST))).flagged is None


def test_images_and_noise_in_memory_are_named_by_their_content(pipe):
    pixels, latents = torch.rand(3, 32, 32), torch.randn(1, 4, 8, 8)
    for given in (pixels, pixels.permute(1, 2, 0).numpy(), Image.open("a.png"), [Image.open("a.png")]):
        recipe = pipe.image_to_image("cat", given, **FAST).recipe
        assert not recipe["replayable"] and len(recipe["inputs"]["image"]) == 64
    first, second = (
        pipe.image_to_image("cat", each, **FAST).recipe["inputs"]
        for each in (pixels, pixels + 1e-3 * (pixels < 0.5))
    )
    assert first != second
    mixed = pipe.inpaint("cat", "a.png", (pixels[0] > 0.5).float(), **FAST).recipe
    assert mixed["inputs"]["image"] == sha256("a.png") and len(mixed["inputs"]["mask"]) == 64
    noise = pipe.text_to_image("cat", latents=latents, **FAST).recipe
    assert not noise["replayable"] and len(noise["inputs"]["latents"]) == 64


# Files that a recipe names


def test_a_file_is_named_by_its_hash_or_refused(pipe):
    recipe = of_file(pipe.image_to_image("cat", "a.png", **FAST))
    entry = recipe["arguments"]["image"]
    assert entry == {"path": "a.png", "sha256": sha256("a.png")}
    wrong: dict[str, Any] = {
        "a bare path": "a.png",
        "a list of paths": ["a.png"],
        "no hash": {"path": "a.png"},
        "a number": 5,
        "pixels": [[0.5]],
    }
    for value in wrong.values():
        with pytest.raises(ValueError, match="image: expected a file with its path and sha256"):
            replay({**recipe, "arguments": {**recipe["arguments"], "image": value}})
    for value in ({"path": 5, "sha256": entry["sha256"]}, {"path": "a.png", "sha256": None}):
        with pytest.raises(ValueError, match=r"image\.(path|sha256): expected str"):
            replay({**recipe, "arguments": {**recipe["arguments"], "image": value}})
    with pytest.raises(ValueError, match="image: 'b.png' is not the file that the image was made of"):
        replay({**recipe, "arguments": {**recipe["arguments"], "image": {**entry, "path": "b.png"}}})
    batch = pipe.image_to_image("cat", ["a.png", "b.png"], n=2, **FAST)
    assert torch.equal(replay(of_file(batch)).tensor, batch.tensor)


def test_every_argument_that_is_an_image_is_known_as_a_file():
    """A new task with another name for its image must not read a path that no hash vouches for."""
    for kind in (ldm.LatentDiffusion, ldm.UnCLIP):
        for name, task in inspect.getmembers(kind, lambda member: hasattr(member, "replayable")):
            for argument, each in inspect.signature(task).parameters.items():
                if "ImageInput" in str(each.annotation):
                    assert argument in FILE_ARGUMENTS, (name, argument)


# Order and limits


def test_the_hub_is_asked_last_and_only_if_allowed(pipe, tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "none"))

    def hub(*_: Any, local_files_only: bool, **__: Any) -> str:
        asked.append("cache" if local_files_only else "hub")
        raise OSError("not there")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    recipe = {**of_file(pipe.image_to_image("cat", "a.png", **FAST)), "model": "sd-v1-5"}
    shutil.copy("a.png", "given.png")
    arguments = {**recipe["arguments"], "image": {"path": "given.png", "sha256": sha256("b.png")}}
    for wrong, message in (
        ({"arguments": arguments}, "is not the file"),
        ({"arguments": {**recipe["arguments"], "steps": 5000}}, "steps: the recipe asks for 5000"),
        ({"weights": 5}, "recipe.weights: expected a mapping"),
        ({"device": "cuda:77"}, "recipe.device 'cuda:77' is not available"),
    ):
        with pytest.raises(ValueError, match=message):
            replay({**recipe, **wrong}, download=True)
    assert asked == []
    with pytest.raises(FileNotFoundError, match=r"not on this machine: allow the download.*--download"):
        replay(recipe)
    assert asked == ["cache"]
    with pytest.raises(FileNotFoundError, match="cannot be downloaded from the hub"):
        replay(recipe, download=True)
    assert asked == ["cache", "cache", "hub"]


TOO_MUCH: dict[str, dict[str, Any]] = {
    "n: images: the recipe asks for 65": {"n": 65},
    "n: images: the recipe asks for 100": {"n": 10, "prompt": ["cat"] * 10},
    "n: images: the recipe asks for 1000": {"seed": list(range(1000))},
    "steps: the recipe asks for 1001": {"steps": 1001},
    "steps: the recipe asks for 1200": {
        "steps": None,
        "grid": {"t": [1.0] * 1200, "alpha": [1.0], "sigma": [0.0]},
    },
    "size: pixels: the recipe asks for": {"height": 4096, "width": 2048},
    "prompt: characters: the recipe asks for 5000": {"prompt": "a" * 5000},
    "negative: characters: the recipe asks for 5000": {"negative": ["a" * 5000]},
    "images times steps times pixels: the recipe asks for": {
        "n": 60,
        "steps": 900,
        "height": 512,
        "width": 512,
    },
}


@pytest.mark.parametrize("message", TOO_MUCH)
def test_a_recipe_may_ask_for_so_much(pipe, monkeypatch, message):
    recipe = {**plain(pipe.text_to_image("cat", **FAST).recipe), **TOO_MUCH[message]}
    monkeypatch.setattr("ldm.registry.replaying.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"{message}.*lift the limits .limits=False, or --no-limits"):
        replay(recipe)
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        replay(recipe, limits=False)


@pytest.mark.parametrize(
    ("stated", "counted"),
    [
        ({"steps": 7}, 7),
        ({"steps": 7, "upsampler_steps": 9}, 9),
        ({"grid": (9.0, 5.0, 0.0)}, 3),
        ({"steps": 2, "grid": {"t": (9.0, 5.0, 0.0), "alpha": (1.0,)}}, 3),
        ({}, 800),
        ({"steps": None, "prior_steps": 25}, 800),
    ],
)
def test_the_steps_of_the_card_count_only_where_the_recipe_states_none(stated, counted):
    usual = Defaults(sampler="ddim", steps=800, guidance=1.0, height=8, width=8)
    check_limits(stated, usual, replace(LIMITS, steps=counted, work=counted * 64))
    with pytest.raises(
        ValueError, match=f"steps: the recipe asks for {counted}, expected at most {counted - 1}"
    ):
        check_limits(stated, usual, replace(LIMITS, steps=counted - 1))
    with pytest.raises(ValueError, match=f"pixels: the recipe asks for {counted * 64}"):
        check_limits(stated, usual, replace(LIMITS, work=counted * 64 - 1))


@pytest.mark.parametrize("name", ["", "a b", "a-b", "\0", "\ud800", "x" * 51, "x" * 100_000, "1"])
def test_names_that_no_option_has_are_refused_in_one_line(pipe, name):
    recipe = plain(pipe.text_to_image("cat", **FAST).recipe)
    of_task = {
        **recipe,
        "task": "image_to_image",
        "arguments": {"prompt": "cat", name: {"path": 1, "sha256": 2}},
    }
    for wrong in ({**recipe, name: 1}, of_task):
        with pytest.raises(ValueError, match="arguments: expected names of options, got '") as caught:
            replay(wrong)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_images_that_are_given_count_too(pipe, monkeypatch):
    recipe = of_file(pipe.outpaint("cat", "a.png", left=4, **FAST))
    small = replace(LIMITS, pixels=36 * 32)
    monkeypatch.setattr("ldm.registry.replaying.LIMITS", small)
    replay(recipe)
    with pytest.raises(ValueError, match="size: pixels: the recipe asks for 1184"):
        replay({**recipe, "arguments": {**recipe["arguments"], "left": 5}})
    monkeypatch.setattr("ldm.registry.replaying.LIMITS", replace(LIMITS, file=100))
    with pytest.raises(ValueError, match="image: 'a.png' has .* bytes, expected at most 100"):
        replay(recipe)
    monkeypatch.undo()


def test_the_command_line_lifts_the_limits(pipe, capsys):
    of_file(pipe.text_to_image("cat " * 1001, **FAST), "long.png")
    assert main(["replay", "long.png"]) == 2 and "--no-limits" in capsys.readouterr().err
    assert main(["replay", "long.png", "--no-limits"]) == 0
    assert np.array_equal(np.asarray(Image.open("long.png")), np.asarray(Image.open("long-replay.png")))


# Damaged recipes

WRONG = (None, True, -1, 1.5, "\x1b[31m", [[]], {"a": {}}, 10**400)


def test_a_wrong_value_in_any_field_is_refused_or_followed(pipe, monkeypatch):
    monkeypatch.setattr("ldm.registry.replaying.load_model", lambda *_, **__: pipe)
    for made in (
        pipe.text_to_image("cat", convention="k", spacing="karras", eta=0.5, sampler="ddim", **FAST),
        pipe.inpaint("cat", "a.png", "b.png", resample=1, strength=0.5, guidance=2.0, **FAST),
    ):
        recipe = plain(made.recipe)
        for name in recipe:
            for value in WRONG:
                follow({**recipe, name: value})
            follow({key: each for key, each in recipe.items() if key != name})
        for name in recipe.get("arguments", {}):
            for value in WRONG:
                follow({**recipe, "arguments": {**recipe["arguments"], name: value}})


def follow(recipe: dict[str, Any]) -> None:
    """Follow a recipe; it must work, or raise a documented error in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            replay(recipe)
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            assert len(text) < 3000 and text.isprintable(), text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "x", "steps: expected int, got 'x'"),
        ("n", True, "n: expected int, got True"),
        ("guidance", "x", "guidance: expected float, got 'x'"),
        ("guidance", [1.0], r"guidance: expected float, got \[1.0\]"),
        ("sampler", ["ddim"], "sampler: expected str"),
        ("seed", "x", "seed: expected int, got 'x'"),
        ("prompt", {"a": 1}, "prompt: expected"),
        ("negative", [1], r"negative\[0\]: expected str, got 1"),
        ("convention", 5, "convention: expected str, got 5"),
        ("convention", {"grids": {"*": {"spacing": 5}}}, "spacing"),
        ("sizes", {"crop": 5}, "sizes.crop: expected a list, got 5"),
        ("grid", {"t": "x"}, "grid.t: expected a list, got 'x'"),
        ("on_step", "x", "on_step: a recipe does not hold it, got 'x'"),
        ("latents", [[1.0]], "latents: a recipe does not hold it"),
        ("eta", {"a": 1}, "eta: expected float"),
        ("new", {"a": 1}, "new: expected"),
    ],
)
def test_errors_name_the_option(pipe, monkeypatch, name, value, message):
    monkeypatch.setattr("ldm.registry.replaying.load_model", lambda *_, **__: pipe)
    recipe = plain(pipe.text_to_image("cat", **FAST).recipe)
    with pytest.raises(ValueError, match=message):
        replay({**recipe, name: value})
    recipe = plain(pipe.image_to_image("cat", "a.png", **FAST).recipe)
    with pytest.raises(ValueError, match=message):
        replay({**recipe, "arguments": {**recipe["arguments"], name: value}})


@pytest.mark.parametrize("field", RecipeFacts.__dataclass_fields__)
def test_the_facts_of_a_recipe_have_types(pipe, field):
    recipe = plain(pipe.text_to_image("cat", **FAST).recipe)
    with pytest.raises(ValueError, match=rf"^recipe.{field}(\[0\])?: expected "):
        replay({**recipe, field: [1]})


def test_an_index_that_is_out_of_range_is_refused(pipe):
    recipe = plain(pipe.text_to_image("cat", n=2, **FAST).recipe)
    for index in (2, -1, 10**9):
        with pytest.raises(ValueError, match="recipe.index: expected 0 to 1"):
            replay({**recipe, "index": index})


@pytest.mark.parametrize(
    "task", ["forward", "eval", "__init__", "device", "settle", "draw", "cpu", "save", "x\x1b[2J"]
)
def test_only_tasks_are_called(pipe, task):
    recipe = plain(pipe.image_to_image("cat", "a.png", **FAST).recipe)
    with pytest.raises(ValueError, match="has no task of this name") as caught:
        replay({**recipe, "task": task})
    assert str(caught.value).isprintable()


def test_texts_of_a_recipe_are_shown_escaped(capsys):
    because = "x\x1b[2K\nloads as: sd-v1-5\u202e"
    write_image(
        Path("bad.png"),
        Image.new("RGB", (8, 8)),
        {
            "task": "t",
            "model": "m",
            "device": "cpu",
            "dtype": "float32",
            "weights": {},
            "versions": {},
            "because": because,
        },
    )
    assert main(["replay", "bad.png"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\\x1b[2K" in error and "\\u202e" in error and error[:-1].isprintable()
