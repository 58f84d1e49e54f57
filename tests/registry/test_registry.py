"""Saving and loading: exact, and strict about wrong files."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.weights.formats.ldm_folder import about_part
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Write a folder of assets with one tiny model."""
    assets = tmp_path_factory.mktemp("assets")
    ldm.save(tiny_model(), assets / "emoji-ldm")
    return assets


@pytest.fixture
def assets(saved, tmp_path, monkeypatch):
    """Use a copy of it as the package's assets."""
    shutil.copytree(saved, tmp_path / "assets")
    monkeypatch.setattr("ldm.catalog.lookup.ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


def load(**options):
    return ldm.load("emoji-ldm", device="cpu", dtype="float32", **options)


def test_a_saved_model_loads_and_gives_the_same_pictures(assets, tmp_path):
    assert "emoji-ldm" in ldm.list_models()
    pipe = load()
    ldm.save(pipe, tmp_path / "again")
    again = load(weights=tmp_path / "again")
    for name, tensor in pipe.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])  # float16 to float32 and back is exact
    assert (
        again.card == pipe.card
        and again.latent_scale == pipe.latent_scale
        and again.text.known_words == pipe.text.known_words
    )
    a, b = (p.text_to_image("red apple", progress=False).tensor for p in (pipe, again))
    assert torch.equal(a, b)


def test_an_embedded_model_with_random_weights(assets):
    pipe, own = load(weights="random"), load()
    assert pipe.text.known_words == own.text.known_words and pipe.origin["random"] == "seed 0"
    for name, tensor in pipe.state_dict().items():
        assert tensor.shape == own.state_dict()[name].shape and not torch.equal(
            tensor, own.state_dict()[name]
        )
    assert pipe.text_to_image("red apple", progress=False).tensor.std() > 0.01


def test_dtype_and_device(assets):
    assert ldm.load("emoji-ldm", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="did you mean 'float32'"):
        ldm.load("emoji-ldm", dtype="float3")
    with pytest.raises(ValueError, match="device 'cpuu'"):
        ldm.load("emoji-ldm", device="cpuu")


def test_an_unknown_model_is_refused_with_the_nearest_name(assets):
    with pytest.raises(ValueError, match="unknown model 'emoji-lmd'; did you mean 'emoji-ldm'"):
        ldm.load("emoji-lmd")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(weights="nowhere")


def damage(folder, change):
    """Change the weights of the UNet and their hash, as in a file of another origin."""
    import hashlib

    import yaml

    path = folder / "unet.safetensors"
    change(path)
    about = about_part(folder, "unet")
    about["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "unet.yaml").write_text(yaml.safe_dump(about), encoding="utf-8")


def edit(**changes):
    def change(path):
        state = {key: value.clone() for key, value in read_safetensors(path).items()}
        for key, value in changes.items():
            key = key.replace("__", ".")
            if value is None:
                del state[key]
            else:
                state[key] = value
        write_safetensors(path, state)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "unet.safetensors"),
        (edit(conv_in__weight=None), "missing.*conv_in.weight"),
        (edit(extra__weight=torch.zeros(1)), "extra.weight"),
        (
            edit(conv_in__weight=torch.zeros(8, 5, 3, 3)),
            r"conv_in.weight: \(8, 5, 3, 3\), expected \(8, 8, 3, 3\)",
        ),
        (edit(conv_in__bias=torch.full((8,), float("nan"))), "NaN or infinity in 1 tensors .*conv_in.bias"),
        (lambda path: path.write_bytes((path.parent / "vae.safetensors").read_bytes()), "does not fit UNet"),
    ],
    ids=["truncated", "missing", "extra", "misshapen", "nan", "another family"],
)
def test_a_file_that_is_not_the_models_is_refused(assets, change, message):
    damage(assets / "emoji-ldm", change)
    with pytest.raises(ValueError, match=message):
        load()


def test_a_file_changed_behind_its_card_is_noticed(assets):
    edit(conv_in__bias=torch.ones(8, dtype=torch.float16))(assets / "emoji-ldm" / "unet.safetensors")
    with pytest.raises(ValueError, match="sha256 differs"):
        load()


def test_a_missing_part_is_named(assets):
    (assets / "emoji-ldm" / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae\.safetensors is absent"):
        load()


def test_weights_of_another_model_are_refused(assets, tmp_path):
    ldm.save(tiny_model("other"), tmp_path / "other")
    with pytest.raises(ValueError, match="those of 'other', not of 'emoji-ldm'"):
        load(weights=tmp_path / "other")
