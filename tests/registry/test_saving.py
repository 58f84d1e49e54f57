"""Saving over a folder: it holds the old model or the new one, and never a mixture."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import kill_at_each_step
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.registry import saving
from ldm.support.files import staged_folder
from ldm.weights.formats.ldm_model import model_files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    ldm.save(tiny_model(), folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    before = contents(folder)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.registry.latent.writing.write_card", fail)
    with pytest.raises(OSError, match="No space left"):
        ldm.save(tiny_model(), folder, note="new")
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_parts_of_the_model_that_is_replaced_do_not_stay(tmp_path):
    folder, pipe = tmp_path / "model", tiny_model()
    ldm.save(pipe, folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    assert (folder / "draft.yaml").is_file()
    pipe.text.draft = None
    ldm.save(pipe, folder)
    assert not list(folder.glob("draft.*")) and (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert contents(folder).keys() - {"notes.txt"} == contents(ldm.save(pipe, tmp_path / "new")).keys()


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.01, 0.02, 0.04])
def test_a_kill_leaves_one_model_or_none(tmp_path, delay):
    """Kill a process that replaces one set of files by another, over and over, at some moment."""
    folder = tmp_path / "model"
    code = (
        "import itertools, sys; from pathlib import Path; from ldm.support.files import staged_folder\n"
        "folder = Path(sys.argv[1])\n"
        "for k in itertools.count():\n"
        "    with staged_folder(folder, ['card.yaml'], lambda f: []) as stage:\n"
        "        for name in ('a', 'b', 'c', 'card.yaml'): (stage / name).write_text(str(k))\n"
        "    if k == 3: print('running', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "running\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = contents(folder)
    assert "card.yaml" not in found or len(set(found.values())) == 1
    with staged_folder(folder, ["card.yaml"], model_files) as stage:
        for name in ("a", "b", "c", "card.yaml"):
            (stage / name).write_text("next", encoding="utf-8")
    assert set(contents(folder).values()) == {b"next"} and os.listdir(tmp_path) == ["model"]


NAMES = ("card.yaml", "facts.json", "unet/config.json", "unet/a.safetensors", "vae/b.bin", "vae/config.json")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_files_of_two_states_are_never_together_and_weights_never_without_the_rest(tmp_path):
    folder = tmp_path / "model"
    seen = set()

    def write(state):
        files = [folder / name for name in (*NAMES, "only-old.txt", "only-new.txt")]
        with staged_folder(
            folder, ["card.yaml"], lambda _: [path for path in files if path.exists()]
        ) as stage:
            for name in (*NAMES, f"only-{state}.txt"):
                (stage / name).parent.mkdir(exist_ok=True)
                (stage / name).write_text(state, encoding="utf-8")

    def check():
        found = contents(folder)
        assert len(set(found.values())) <= 1
        assert "card.yaml" not in found or found.keys() > set(NAMES)
        for part in ("unet", "vae"):
            weights = [name for name in found if Path(name).parent == Path(part) and "config" not in name]
            assert not weights or found.keys() > {"facts.json", f"{part}/config.json"}
        seen.update(found.values())
        shutil.rmtree(folder)
        write("old")

    write("old")
    steps = kill_at_each_step(lambda: write("new"), folder, check)
    assert (
        steps >= 2 * len(NAMES)
        and seen == {b"old", b"new"}
        and contents(folder).keys() == {*NAMES, "only-new.txt"}
    )


def test_a_folder_in_diffusers_layout_keeps_no_weights_of_the_last_model(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "old.safetensors").write_bytes(b"x")
    (folder / "unet" / "notes.md").write_bytes(b"x")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "a.safetensors").write_bytes(b"x")
    (folder / "other").mkdir()
    (folder / "other" / "mine").write_bytes(b"x")
    (folder / saving.PIPELINE_INDEX).write_text(
        '{"_class_name": "A", "unet": ["x", "B"], "../beside": ["x", "B"], "..": [null, null]}',
        encoding="utf-8",
    )
    assert saving.component_files(folder) == [folder / "unet" / "old.safetensors"]
