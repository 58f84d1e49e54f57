"""`ldm evaluate` on folders of images and on what a model draws."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from image_sets import random_images
from tiny_latent_diffusion import tiny_model
from torchvision.utils import save_image

import ldm
from ldm.__main__ import main
from ldm.analysis.metrics.sets import draw_set, open_set


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_images(folder: Path, n: int, *, seed: int = 0, captions: bool = True) -> Path:
    folder.mkdir()
    for i, image in enumerate(random_images(n, 24, seed=seed)):
        save_image(image, folder / f"image {i:03d}.png")
        if captions:
            (folder / f"image {i:03d}.txt").write_text(f"a red apple {i}\n", encoding="utf-8")
    return folder


def test_two_folders_are_compared(work, capsys):
    write_images(work / "made", 12, seed=1)
    write_images(work / "real", 14, captions=False)
    (work / "real" / "broken.txt").write_text("no image", encoding="utf-8")
    arguments = "evaluate made --reference real --resamples 20 --json a.json --report a.html"
    assert main(arguments.split()) == 0
    out, err = capsys.readouterr()
    found = json.loads(Path("a.json").read_text(encoding="utf-8"))
    names = [each["metric"] for each in found["estimates"]]
    assert names == ["fid", "kid", "cmmd", "precision", "recall", "clip_score"]
    assert all(name in out for name in names) and "12 images" in err and "broken.txt" in err
    assert {each["generated"] for each in found["estimates"]} == {12}
    text = Path("a.html").read_text(encoding="utf-8")
    assert "image 003.png" in text and "crop" in text and "made against real" in text


def test_shards_are_read_as_the_folder_that_they_were_made_of(work):
    folder = write_images(work / "made", 7)
    with tarfile.open(work / "a-000.tar", "w:") as first, tarfile.open(work / "a-001.tar", "w:") as second:
        for path in sorted(folder.iterdir()):
            (first if int(path.stem[-3:]) < 4 else second).add(path, path.name.replace(" ", "-"))
    for shards in ("a-{000..001}.tar", str(work)):
        found, expected = open_set(shards), open_set(folder)
        assert len(found) == 7 and found.captions() == expected.captions()
        for a, b in zip(found.images(), expected.images(), strict=True):
            assert torch.equal(a, b)
        assert [image.shape for image in found.images([2, 5])] == [(3, 24, 24)] * 2


def test_a_model_is_measured_on_prompts_and_goes_on_where_it_was(work, capsys):
    ldm.save(tiny_model(), work / "model")
    Path("prompts.txt").write_text("a red apple\n\na cat\na blue background\n", encoding="utf-8")
    arguments = "evaluate drawn --weights model --prompts prompts.txt --steps 2 --seed 5 --batch 2"
    assert main([*arguments.split(), "--resamples", "20", "--metrics", "clip_score"]) == 0
    assert "clip_score" in capsys.readouterr().out
    files = sorted(path.name for path in Path("drawn").iterdir())
    assert files == [f"sample-{k}.{kind}" for k in (5, 6, 7) for kind in ("png", "txt")]
    pipe = ldm.load(weights="model")
    before = {path.name: path.read_bytes() for path in Path("drawn").iterdir()}
    for path in Path("drawn").glob("sample-6.*"):
        path.unlink()
    found = draw_set(pipe, ["a red apple", "a cat", "a blue background"], Path("drawn"), seed=5, steps=2)
    assert found.captions() == ["a red apple", "a cat", "a blue background"]
    after = {path.name: path.read_bytes() for path in Path("drawn").iterdir()}
    assert before.keys() == after.keys() and before["sample-7.png"] == after["sample-7.png"]
    again = open_set("drawn")
    (pixels,) = again.images([1])
    alone = pipe.text_to_image("a cat", seed=6, steps=2, progress=False).numpy()[0]
    assert (pixels.permute(1, 2, 0).numpy() * 255).round().astype("uint8").tolist() == alone.tolist()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("evaluate", "expected a folder or shards of generated images"),
        ("evaluate none --reference none", "none"),
        ("evaluate made --features incption=x", "unknown open_clip model"),
        ("evaluate made --reference made --metrics fdi", "metric 'fdi'"),
        ("evaluate made --report a.pdf", r".html or .png"),
        ("evaluate made --resamples 3", "at least 20"),
    ],
)
def test_what_is_wrong_is_one_line(work, capsys, arguments, message):
    write_images(work / "made", 5)
    assert main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
