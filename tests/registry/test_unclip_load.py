"""unCLIP models by name: random weights, saved, loaded, from the command line and replayed; wrong options."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reduced_unclip_families
import torch
import yaml
from PIL import Image
from tiny_unclip import tiny_karlo

import ldm
from ldm.__main__ import main
from ldm.catalog.lookup import find_card, find_model
from ldm.catalog.published_unclip import PRIOR_CARDS, UNCLIP_CARDS
from ldm.images.files import read_recipe
from ldm.pipelines.unclip import UnCLIP

PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("base", reduced_unclip_families.NETWORKS)
def test_every_published_model_runs_with_random_weights_and_is_read_back_bit_identical(
    base: str, tmp_path: Path
) -> None:
    card = reduced_unclip_families.register(base, tmp_path)
    pipe = reduced_unclip_families.load(card.name)
    assert (
        isinstance(pipe, UnCLIP)
        and pipe.card == card
        and set(pipe.networks()) == set(card.networks.configs())
    )
    if pipe.prior is None:
        images = pipe.variations(PICTURE, n=2, progress=False)
    elif card.concat == "known":
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 16:] = 1
        images = pipe.inpaint("a cat", PICTURE, mask, n=2, progress=False)
    else:
        images = pipe.text_to_image("a cat", n=2, progress=False)
    assert (
        images.tensor.shape == (2, 3, 32, 32)
        and float(images.tensor.std()) > 0.005
        and not torch.equal(*images.tensor)
    )
    ldm.save(pipe, tmp_path / "saved")
    for again in (
        reduced_unclip_families.load(card.name, weights=tmp_path / "saved"),
        reduced_unclip_families.load(None, weights=tmp_path / "saved"),
    ):
        before, after = pipe.state_dict(), again.state_dict()
        assert before.keys() == after.keys() and all(
            torch.equal(after[key], value) for key, value in before.items()
        )
        assert again.card == card and set(again.origin) >= {*pipe.networks(), "card"}


def test_the_names_and_how_they_are_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    assert {*UNCLIP_CARDS, *PRIOR_CARDS} <= set(ldm.list_models())
    assert find_model("karlo-v1-alpha") == UNCLIP_CARDS["karlo-v1-alpha"].decoder
    assert find_card("kandinsky-2-2")[0].summary == "Kandinsky 2.2"
    assert main(["grid", "--model", "karlo-v1-alpha", "--steps", "4"]) == 0
    assert "ddpm, variance learned: 4 steps" in (out := capsys.readouterr().out) and " 999 " in out
    assert main(["models"]) == 0 and "sd-v2-1-unclip-h: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean 'karlo-v1-alpha'"):
        ldm.load("karlo-v1-alfa")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder to work in, with tiny-unclip among the embedded models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.catalog.lookup.ASSETS", tmp_path / "assets")
    pipe = tiny_karlo()
    pipe.card = replace(pipe.card, name="tiny-unclip", family="unclip", networks=None)
    ldm.save(pipe, tmp_path / "assets" / "tiny-unclip")
    return tmp_path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_command_line_makes_four_pictures_and_makes_them_again(dtype: str, tiny: Path) -> None:
    assert "tiny-unclip" in ldm.list_models()
    assert main(["a red apple", "--model", "tiny-unclip", "--dtype", dtype, "-o", "grid.png"]) == 0
    recipe = read_recipe("grid.png")
    assert (recipe["task"], recipe["n"], recipe["seed"], recipe["model"]) == (
        "text_to_image",
        4,
        [0, 1, 2, 3],
        "tiny-unclip",
    )
    assert np.asarray(Image.open("grid.png")).shape == (64, 64, 3)
    assert main(["replay", "grid.png"]) == 0
    assert (np.asarray(Image.open("grid.png")) == np.asarray(Image.open("grid-replay.png"))).all()
    assert (
        main(
            [
                "cat",
                "--model",
                "tiny-unclip",
                "--n",
                "1",
                "--steps",
                "2",
                "--guidance",
                "1",
                "--sampler",
                "ddim",
                "-o",
                "one.png",
            ]
        )
        == 0
    )
    assert read_recipe("one.png")["sampler"] == "ddim"


def test_every_task_has_its_command(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", "tiny-unclip", "--dtype", "float32", "--steps", "2", "-o", "out.png"]
    Image.fromarray((PICTURE[0, :, :16, :16] * 255).byte().permute(1, 2, 0).numpy()).save("picture.png")
    Image.fromarray(np.pad(np.full((16, 8), 255, np.uint8), ((0, 0), (8, 0)))).save("mask.png")
    for arguments, task, shape in (
        (["vary", "picture.png"], "variations", (64, 64, 3)),
        (["inpaint", "a cat", "picture.png", "mask.png", "--n", "1"], "inpaint", (16, 16, 3)),
        (["outpaint", "a cat", "picture.png", "--right", "8", "--n", "1"], "outpaint", (16, 24, 3)),
        (["interpolate", "a cat", "a dog", "--n", "3", "--seed", "2"], "interpolate", (64, 64, 3)),
        (["reconstruct", "picture.png", "--prompt", ""], "variations", (16, 16, 3)),
    ):
        assert main([*arguments, *common]) == 0, capsys.readouterr().err
        recipe = read_recipe("out.png")
        assert recipe["task"] == task and np.asarray(Image.open("out.png")).shape == shape
        assert main(["replay", "out.png"]) == 0, capsys.readouterr().err
        assert (np.asarray(Image.open("out.png")) == np.asarray(Image.open("out-replay.png"))).all()
    assert (
        main(["edit", "a cat", "a dog", *common]) == 2
        and "'tiny-unclip' has no edit; its commands: generate, inpaint" in capsys.readouterr().err
    )


def test_weights_that_are_anothers_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    ldm.save(tiny_karlo(), tmp_path / "karlo")
    with pytest.raises(ValueError, match="those of 'karlo-v1-alpha', not of 'kandinsky-2-2'"):
        ldm.load("kandinsky-2-2", weights=tmp_path / "karlo")
    with pytest.raises(ValueError, match="expected 'native', the only one for UnCLIP"):
        ldm.save(tiny_karlo(), tmp_path / "x", layout="diffusers")
    with pytest.raises(ValueError, match="options of latent diffusion"):
        ldm.load("karlo-v1-alpha", weights=tmp_path / "karlo", prediction="v")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="one folder below"):
        ldm.load("karlo-v1-alpha", weights=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ldm.load("karlo-v1-alpha", weights=tmp_path / "nowhere")
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="come as a folder"):
        ldm.load("karlo-v1-alpha", weights=tmp_path / "one.safetensors")


def test_parts_may_lie_in_another_models_folder(tmp_path: Path) -> None:
    """A card locates vision and vae elsewhere: they are read there, and a saved copy holds them."""
    pipe = reduced_unclip_families.load(reduced_unclip_families.register("kandinsky-2-2", tmp_path).name)
    ldm.save(pipe, tmp_path / "a")
    (tmp_path / "b").mkdir()
    for path in [*(tmp_path / "a").glob("vision.*"), *(tmp_path / "a").glob("vae.*")]:
        shutil.move(path, tmp_path / "b")
    card = yaml.safe_load((tmp_path / "a" / "card.yaml").read_text(encoding="utf-8"))
    with pytest.raises(FileNotFoundError, match=r"'vae\.safetensors', 'vae\.yaml', .* is absent"):
        reduced_unclip_families.load(None, weights=tmp_path / "a")
    (tmp_path / "a" / "card.yaml").write_text(
        yaml.safe_dump({**card, "parts": {"vision": "../b", "vae": "../b"}}),
        encoding="utf-8",
    )
    shared = reduced_unclip_families.load(None, weights=tmp_path / "a")
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipe.state_dict().values(), shared.state_dict().values(), strict=True)
    )
    ldm.save(shared, tmp_path / "c")
    assert (
        reduced_unclip_families.load(None, weights=tmp_path / "c").card.parts == {}
        and (tmp_path / "c" / "vae.yaml").is_file()
    )
    (tmp_path / "b" / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae\.safetensors is absent"):
        reduced_unclip_families.load(None, weights=tmp_path / "a")


def test_inspect_reports_a_folder_in_ldm_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ldm.save(tiny_karlo(), tmp_path / "karlo")
    assert main(["inspect", str(tmp_path / "karlo")]) == 0
    out = capsys.readouterr().out
    assert "karlo-v1-alpha" in out and "upsampler-last" in out and "AutoregressivePrior" not in out
    text = (tmp_path / "karlo" / "prior.yaml").read_text(encoding="utf-8")
    about = json.loads(json.dumps(yaml.safe_load(text)))
    assert about["sha256"] in out
