"""Parts of two models together never load: the index of a model states the SHA-256 of all its files."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import reduced_families
import torch
import yaml
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_karlo

import ldm
from ldm.__main__ import main
from ldm.catalog.lookup import embedded, find_card
from ldm.weights.formats.ldm_model import part_files
from ldm.weights.formats.safetensors import fingerprint, sha256
from ldm.weights.hashing import FileHashes


def load(folder: Path, name: str | None = None) -> Any:
    return ldm.load(name, weights=folder, device="cpu", dtype="float32")


def changed(pipe: Any) -> Any:
    """Change the largest tensor of every network slightly, so that all shapes stay."""
    for network in pipe.networks().values():
        tensor = max(network.state_dict().values(), key=lambda each: each.numel())
        tensor.data[0] += 0.25
    return pipe


@pytest.mark.parametrize("name", embedded())
def test_the_cards_of_the_embedded_models_state_the_hashes_of_their_files(name):
    card, folder = find_card(name)
    assert card.files == dict(FileHashes(part_files(card.part_folders(folder))))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    ldm.save(tiny_model(), folder / "a")
    other = changed(tiny_model())
    other.text.known_words = frozenset(["red"])
    ldm.save(other, folder / "b")
    return folder


FILES = [
    *(f"{part}{end}" for part in ("unet", "vae", "text", "draft") for end in (".safetensors", ".yaml", ".*"))
]


@pytest.mark.parametrize("files", [*FILES, "vocabulary.json", "card.yaml"])
def test_a_part_of_another_model_is_noticed(native, tmp_path, files):
    folder = tmp_path / "mixed"
    shutil.copytree(native / "a", folder)
    load(folder)
    for path in (native / "b").glob(files):
        shutil.copy(path, folder)
    with pytest.raises(ValueError, match=r"sha256 differs: '(unet|vae|text|draft|vocabulary)\."):
        load(folder)


@pytest.mark.parametrize("files", ["draft.yaml", "draft.*"])
def test_a_part_that_is_lost_is_noticed(native, tmp_path, files):
    folder = tmp_path / "lost"
    shutil.copytree(native / "a", folder)
    for path in folder.glob(files):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"'draft\.safetensors', 'draft\.yaml' is absent"):
        load(folder)


def test_a_part_that_is_added_is_noticed(native, tmp_path):
    pipe = tiny_model()
    pipe.text.draft = None
    folder = ldm.save(pipe, tmp_path / "added")
    load(folder)
    for path in (native / "a").glob("draft.*"):
        shutil.copy(path, folder)
    with pytest.raises(ValueError, match=r"'draft\.safetensors', 'draft\.yaml' is not named there"):
        load(folder)


def test_a_card_without_hashes_is_loaded_with_a_warning(native, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(native / "a", folder)
    card = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    del card["files"]
    (folder / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    with pytest.warns(UserWarning, match="states no sha256 of its parts"):
        load(folder)
    (folder / "card.yaml").unlink()  # as while a model is written
    with pytest.raises(FileNotFoundError, match="neither model_index.json .* nor card.yaml"):
        load(folder, "emoji-ldm")


@pytest.mark.parametrize(
    "files", [*(f"{part}.*" for part in ("prior", "decoder", "text", "vision", "upsampler"))]
)
def test_a_part_of_another_unclip_model_is_noticed(tmp_path, files):
    ldm.save(tiny_karlo(), tmp_path / "a")
    ldm.save(changed(tiny_karlo()), tmp_path / "b")
    for path in (tmp_path / "b").glob(files):
        shutil.copy(path, tmp_path / "a")
    with pytest.raises(ValueError, match="sha256 differs"):
        load(tmp_path / "a")


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    card = reduced_families.register("sd-v1-5", folder)
    pipe = reduced_families.load(card.name)
    ldm.save(pipe, folder / "a", layout="diffusers")
    ldm.save(changed(copy.deepcopy(pipe)), folder / "b", layout="diffusers")
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    ],
)
def test_a_file_of_another_diffusers_folder_is_noticed(diffusers, tmp_path, file):
    folder = tmp_path / "mixed"
    shutil.copytree(diffusers / "a", folder)
    load(folder, "tiny-sd-v1-5")
    if file.endswith(".json"):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(
            json.dumps(content), encoding="utf-8"
        )  # equal, but not the file that was written
    else:
        shutil.copy(diffusers / "b" / file, folder / file)
    with pytest.raises(ValueError, match=f"sha256 differs: '{file}'"):
        load(folder, "tiny-sd-v1-5")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    del index["_ldm_sha256"]  # a folder of another program
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    load(folder, "tiny-sd-v1-5")


def test_other_names_for_the_same_weights_and_names_that_lead_out(diffusers, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(diffusers / "a", folder)
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    load(folder, "tiny-sd-v1-5")
    (unet / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"'unet/config\.json' is absent"):
        load(folder, "tiny-sd-v1-5")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name in ("../a/unet/config.json", "/etc/passwd", "unet/../unet/config.json", ""):
        index["_ldm_sha256"] = {name: "0" * 64}
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(ValueError, match="expected the paths of files in the folder"):
            load(folder, "tiny-sd-v1-5")
    index["_ldm_sha256"] = {"unet/config.json": 5}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="_ldm_sha256.*expected str, got 5"):
        load(folder, "tiny-sd-v1-5")


def test_other_programs_ignore_the_hashes_and_drop_them(diffusers, tmp_path, caplog):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(diffusers / "a", safety_checker=None)
    assert "_ldm_sha256" not in caplog.text
    pipe.save_pretrained(tmp_path / "again")
    assert "_ldm_sha256" not in (tmp_path / "again" / "model_index.json").read_text(encoding="utf-8")
    load(tmp_path / "again", "tiny-sd-v1-5")


def test_a_model_that_is_saved_over_one_in_the_other_layout_replaces_it(diffusers, native, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(diffusers / "a", folder)
    ldm.save(tiny_model(), folder)
    assert load(folder).card.name == "emoji-ldm"
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        path.name for path in (native / "a").iterdir()
    }
    pipe = load(diffusers / "a", "tiny-sd-v1-5")
    ldm.save(pipe, folder, layout="diffusers")
    assert not (folder / "card.yaml").exists() and not (folder / "unet.yaml").exists()
    again = load(folder, "tiny-sd-v1-5")
    assert all(map(torch.equal, pipe.state_dict().values(), again.state_dict().values()))
    for path in (native / "a").iterdir():  # by hand: the card says which files are its model's
        shutil.copy(path, folder)
    assert load(folder).card.name == "emoji-ldm"
    card = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    (folder / "card.yaml").write_text(yaml.safe_dump({**card, "files": None}), encoding="utf-8")
    with pytest.raises(ValueError, match="a model in ldm layout and one in diffusers layout"):
        load(folder)


def test_hashes_are_those_of_the_files_that_were_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"first" * 10**6)
    (tmp_path / "b").write_bytes(b"")
    expected = {name: sha256(tmp_path / name) for name in ("a", "b")}
    hashes = FileHashes({"a": tmp_path / "a", "b": tmp_path / "b"})
    (tmp_path / "new").write_bytes(b"second")
    (tmp_path / "new").replace(tmp_path / "a")
    assert hashes == expected and dict(hashes) == expected and len(hashes) == 2
    assert copy.deepcopy(hashes) == expected and pickle.loads(pickle.dumps(hashes)) == expected
    both = hashes.renamed({"b": "c"}).joined({"seed": "0"})
    assert both == {"c": expected["b"], "seed": "0"} and both.files == {"c": tmp_path / "b"}
    with pytest.raises(FileNotFoundError, match="none"):
        FileHashes({"none": tmp_path / "none"})


def test_every_byte_of_a_single_file_counts_in_recipes(tmp_path):
    """A fingerprint of blocks does not tell files apart that differ between the blocks."""
    card = reduced_families.register("sd-v1-5", tmp_path)
    path = ldm.save(reduced_families.load(card.name), tmp_path / "one.safetensors", layout="original")
    before, mark = load(path, card.name).origin, fingerprint(path)
    data = bytearray(path.read_bytes())
    assert len(data) > 2**20
    for at in range(len(data) - 5000, len(data)):
        data[at] ^= 1
        path.write_bytes(data)
        if fingerprint(path) == mark:
            break
        data[at] ^= 1
    assert fingerprint(path) == mark and load(path, card.name).origin != before


def test_inspect_names_a_part_of_another_model(native, diffusers, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(diffusers / "a", folder)
    main(["inspect", str(folder)])
    assert "sha256 differs" not in capsys.readouterr().out
    shutil.copy(diffusers / "b" / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae")
    main(["inspect", str(folder)])
    assert "sha256 differs: 'vae/" in capsys.readouterr().out
    folder = tmp_path / "mixed"
    shutil.copytree(native / "a", folder)
    assert main(["inspect", str(folder)]) == 0 and "PROBLEM" not in capsys.readouterr().out
    for path in (native / "b").glob("vae.*"):
        shutil.copy(path, folder)
    main(["inspect", str(folder)])
    assert "sha256 differs: 'vae." in capsys.readouterr().out
