"""A model trained from scratch on a folder of images by documented commands, interrupted and loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from photos import write_photos
from test_folder_training import folder_configs
from tiny_trainings import write_recipe

import ldm
from ldm.support.config import read_yaml
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
        while not Path(f"killed/photos/{stage}/checkpoint.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
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
