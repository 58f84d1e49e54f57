"""`--control` of the commands that generate images, and `--controls` of replay."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from control_nets import lines, random_control_net, reduced_config, write_png
from PIL import Image
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.cli.parsing import parse_control
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import to_layout

FAST = ["--steps", "2", "--dtype", "float32"]


def test_the_option_is_taken_apart() -> None:
    assert parse_control("a.pth:b.png") == ("a.pth", "b.png", ())
    assert parse_control("a.pth:b.png:0.8") == ("a.pth", "b.png", (0.8,))
    assert parse_control("C:/a.pth:b.png:0.8:0:0.5") == ("C:/a.pth", "b.png", (0.8, 0.0, 0.5))
    for text in ("a.pth", "a.pth:", ":b.png", "a.pth:b.png:0.8:0.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected FILE:HINT"):
            parse_control(text)


def test_images_are_those_of_the_pipeline_and_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = tiny_model()
    ldm.save(pipe, tmp_path / "assets" / "emoji-ldm")
    monkeypatch.setattr("ldm.catalog.lookup.ASSETS", tmp_path / "assets")
    network = random_control_net(reduced_config(pipe.networks()["unet"].config))
    Path("controls").mkdir()
    write_safetensors(Path("controls/net.safetensors"), to_layout(network, "original"))
    write_png(Path("hint.png"), lines(32))
    assert main(["generate", "cat", "--control", "controls/net.safetensors:hint.png:0.7", *FAST]) == 0
    made = np.asarray(Image.open("ldm.png"))
    assert main(["generate", "cat", "-o", "plain.png", *FAST]) == 0
    assert not np.array_equal(made, np.asarray(Image.open("plain.png")))
    loaded = ldm.load("emoji-ldm", dtype="float32")
    loaded.controls.load("controls/net.safetensors")
    own = loaded.text_to_image("cat", controls=[("net", "hint.png", 0.7)], steps=2, progress=False)
    own.save("own.png")
    assert np.array_equal(made, np.asarray(Image.open("own.png")))
    assert main(["replay", "ldm.png", "--controls", "controls"]) == 0
    assert np.array_equal(made, np.asarray(Image.open("ldm-replay.png")))
    capsys.readouterr()
    assert main(["generate", "cat", "--control", "controls/net.safetensors:absent.png", *FAST]) == 2
    assert "no such file" in capsys.readouterr().err
