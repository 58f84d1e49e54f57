"""The `openai` client 0.28, in an environment of its own: LDM_OLD_OPENAI is its Python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from running_server import running_server
from tiny_latent_diffusion import tiny_model

PYTHON = os.environ.get("LDM_OLD_OPENAI")
SCRIPT = Path(__file__).parents[1] / "helpers" / "old_openai_client.py"


@pytest.mark.skipif(PYTHON is None, reason="LDM_OLD_OPENAI names no Python with openai 0.28")
def test_every_method_of_the_old_client(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "image.png")
    mask = Image.new("RGBA", (32, 32), "white")
    mask.paste((0, 0, 0, 0), (8, 8, 20, 20))
    mask.save(tmp_path / "mask.png")
    pipe = tiny_model("tiny")
    with running_server({"tiny": lambda: pipe}) as running:
        done = subprocess.run(
            [str(PYTHON), str(SCRIPT), running.v1, str(tmp_path / "image.png"), str(tmp_path / "mask.png")],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("version").startswith("0.28")
    assert found == {
        "url": [True] * 5,
        "b64_json": [True] * 5,
        "error of n": ["n", 400],
        "error of size": ["size", 400],
        "error of model": ["model", 404],
    }
