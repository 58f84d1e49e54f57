"""DALL·E Mini on the command line: animations and ranking by a CLIP."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dalle import CARD, tiny_dalle

import ldm
from ldm.__main__ import main
from ldm.analysis.metrics.features import open_features
from ldm.images.files import read_recipe

ROWS = CARD.side // 16


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a tiny model in the ldm layout, and change to the folder above it."""
    monkeypatch.chdir(tmp_path)
    ldm.save(tiny_dalle(), "model")
    return tmp_path


def test_the_tokens_appear_row_by_row(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["an apple", "--weights", "model", "--n", "1", "--seed", "3", "-o", "out.png"]
    assert main([*command, "--animate", "out.gif"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.split() == ["out.png", "out.gif"]
    assert read_recipe("out.png")["replayable"]
    with Image.open("out.gif") as frames:
        assert frames.n_frames == ROWS
        grey = []
        for i in range(ROWS):
            frames.seek(i)
            pixels = np.asarray(frames.convert("RGB"), dtype=float)
            grey.append(bool((abs(pixels[-8:] - 127.5) < 8).all()))
    assert grey == [True] * (ROWS - 1) + [False]


def test_images_are_ranked_by_the_clip_that_is_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["rerank", "an apple", "--weights", "model", "--of", "4", "--keep", "2", "-o", "out.png"]
    assert main([*command, "--clip", "emoji-clip", "--animate", "out.gif", "--top-k", "9"]) == 0
    recipe = read_recipe("out.png")
    every = ldm.load(weights="model").text_to_image("an apple", n=4, top_k=9, progress=False)
    clip = open_features("emoji-clip")
    with torch.no_grad():
        images, texts = clip(every.tensor), clip.text_features(every.prompts)  # type: ignore[attr-defined]
    cosines = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts[0], dim=0)
    best = cosines.argsort(descending=True)[:2].tolist()
    assert recipe["reranked"]["scores"] == pytest.approx(cosines[best].tolist(), abs=1e-3)
    with Image.open("out.gif") as frames:
        assert frames.n_frames == ROWS and frames.size == Image.open("out.png").size
    assert main(command) == 2 and "has no CLIP of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a cat", "--animate", "out.png"], "expected .*gif"),
        (["--prompts", "p.txt", "--out", "shards", "--animate", "a.gif"], "shards hold no animations"),
        (["rerank", "a cat", "--clip", "emoji-clop"], "expected 'emoji-clip' or NAME=PATH"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    options: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "p.txt").write_text("a cat", encoding="utf-8")
    assert main([*options, "--weights", "absent"]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err
