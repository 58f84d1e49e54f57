"""A model trained from scratch on a folder of images by documented commands, interrupted and loaded."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from photos import write_photos
from test_folder_training import folder_configs
from tiny_latent_diffusion import tiny_model
from tiny_trainings import write, write_recipe

import ldm
from ldm.support.config import read_yaml
from ldm.training.distributed.saving import last_step
from ldm.weights.formats.safetensors import read_safetensors

ROOT = Path(__file__).parents[2]


def run_ldm(*arguments: str) -> subprocess.Popen[str]:
    """Start `ldm` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ldm", *arguments]
    return subprocess.Popen(
        command, env=environment, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def tiny_stages(photos: Path) -> dict[str, dict[str, Any]]:
    """Return the stages of configs/photos with tiny networks and few steps."""
    made = folder_configs(photos, checkpoint_every=1, validate_every=100)
    stages = {"autoencoder": made["vae"], "clip": made["clip"], "unet": made["unet"]}
    for stage in stages.values():
        del stage["run"]["name"]
        for key in ("vae", "text"):
            stage.pop(key, None)
    stages["unet"]["text"] = {"tuned": False}
    return stages


def await_file(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a file that a process writes."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_command_fine_tunes_a_model_which_kills_do_not_change(tmp_path, monkeypatch):
    """The stage file is that of docs/training.md with a tiny model."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 200)
    ldm.save(tiny_model(), tmp_path / "model")
    stage = {
        "part": "fine-tune",
        "weights": "model",
        "train": ["unet", "vae_decoder"],
        "recompute": True,
        "data": {"kind": "folder", "path": "photos", "size": 32},
        "diffusion": {"min_snr": 5, "offset_noise": 0.05, "drop": 0.1},
        "run": {"steps": 12, "batch": 8, "checkpoint_every": 2, "optimizer": {"lr": 1e-3, "warmup": 2}},
    }
    write(stage, tmp_path / "tuned.yaml")
    rng, checkpoint = random.Random(0), Path("killed/tuned/checkpoint.pt")
    for kill in range(3):
        process = run_ldm("train", "tuned.yaml", "--runs", "killed")
        step = last_step(checkpoint.parent)
        while last_step(checkpoint.parent) == step and kill < 2:  # the last one while it starts
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate()
    assert 0 < last_step(checkpoint.parent) < 12
    for runs in ("killed", "whole"):
        process = run_ldm("train", "tuned.yaml", "--runs", runs)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for part in ("unet", "vae", "text"):
        whole, killed = (
            read_safetensors(Path(runs, "tuned", "export", f"{part}.safetensors"))
            for runs in ("whole", "killed")
        )
        assert whole.keys() == killed.keys() and all(torch.equal(whole[key], killed[key]) for key in whole)
    process = run_ldm("a red cat", "--weights", "killed/tuned/export", "--steps", "2", "-o", "cat.png")
    _, errors = process.communicate()
    assert process.returncode == 0 and Path("cat.png").is_file(), errors
    assert ldm.load(weights="killed/tuned/export").card.name == "emoji-ldm"


@pytest.mark.slow
def test_two_commands_train_a_model_from_scratch_which_kills_do_not_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = write_photos(tmp_path / "photos", 200)
    recipe = read_yaml(ROOT / "configs/photos/recipe.yaml")
    card = {**read_yaml(ROOT / "configs/photos/card.yaml"), "name": "tiny-photos"}
    card["defaults"] = {**card["defaults"], "height": 32, "width": 32}
    write_recipe(tmp_path / "photos-recipe", recipe, tiny_stages(photos), card)
    check = run_ldm("data", "check", "photos", "--size", "32")
    printed, errors = check.communicate()
    assert check.returncode == 0 and "images: 200" in printed, errors
    for stage in ("autoencoder", "clip", "unet"):  # kill it in each stage
        process = run_ldm("train", "photos-recipe", "--runs", "killed")
        await_file(Path(f"killed/photos/{stage}/checkpoint.pt"), process)
        process.kill()
        process.communicate()
    for runs in ("killed", "whole"):
        process = run_ldm("train", "photos-recipe", "--runs", runs)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    models = [tmp_path / runs / "photos" / "model" for runs in ("whole", "killed")]
    for part in ("vae", "text", "unet"):
        whole, killed = (read_safetensors(model / f"{part}.safetensors") for model in models)
        assert whole.keys() == killed.keys() and all(torch.equal(whole[key], killed[key]) for key in whole)
    pipe = ldm.load(weights=models[1], device="cpu", dtype="float32")
    images = pipe.text_to_image("a red disc", steps=2, progress=False)
    assert images.tensor.shape == (1, 3, 32, 32) and bool(images.tensor.isfinite().all())
