"""Data sets of generated images: tables, shards that do not depend on the processes, restarts."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from many_processes import free_port
from PIL import Image
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.data.generated.prompts import PromptRow, read_prompt_table
from ldm.data.generated.shards import ShardPlan, generate_shards
from ldm.images.files import read_recipe

ROOT = Path(__file__).parents[2]
ROWS = [
    PromptRow(prompt="a red apple"),
    PromptRow(prompt="a cat", options={"steps": 2}),
    PromptRow(prompt="a cat on a blue background", seed=7, options={"steps": 2, "negative": "red"}),
    PromptRow(prompt="a blue cat", options={"steps": 2}),
    PromptRow(prompt="a cat", options={"guidance": 1.5}),
]


@pytest.fixture(scope="module")
def pipe():
    return tiny_model()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for entry in tar:
                assert entry.name not in found
                found[entry.name] = tar.extractfile(entry).read()
    return found


def test_shards_hold_each_image_once_with_its_recipe(pipe, tmp_path):
    plan = ShardPlan(rows=ROWS, n=2, seed=100, options={"steps": 3}, shard=4, batch=3)
    paths = generate_shards(pipe, plan, tmp_path / "set")
    assert [path.name for path in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    files = members(tmp_path / "set")
    assert sorted(files) == [f"{i:09d}.{suffix}" for i in range(10) for suffix in ("json", "png", "txt")]
    seeds = [100, 101, 102, 103, 7, 8, 106, 107, 108, 109]
    for i in range(10):
        row = ROWS[i // 2]
        about = json.loads(files[f"{i:09d}.json"])
        assert files[f"{i:09d}.txt"].decode() == row.prompt == about["caption"]
        assert about["image_seed"] == seeds[i] and about["steps"] == row.options.get("steps", 3)
        image = Image.open(io.BytesIO(files[f"{i:09d}.png"]))
        alone = pipe.text_to_image(
            row.prompt, **{"seed": seeds[i], "steps": 3, **row.options}, progress=False
        )
        error = np.abs(np.asarray(image, dtype=int) - alone.numpy()[0].astype(int))
        assert error.max() <= 1  # a batch rounds otherwise than one image
    (tmp_path / "one.png").write_bytes(files["000000005.png"])
    assert read_recipe(tmp_path / "one.png")["pixels"] == json.loads(files["000000005.json"])["pixels"]


def test_processes_write_what_one_does_and_a_restart_skips_finished_shards(pipe, tmp_path):
    plan = ShardPlan(rows=ROWS, n=2, shard=2, batch=2)
    generate_shards(pipe, plan, tmp_path / "one")
    for rank in (2, 0, 1):
        generate_shards(pipe, plan, tmp_path / "three", rank=rank, size=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    (tmp_path / "three" / "000003.tar").unlink()
    again = generate_shards(pipe, plan, tmp_path / "three")  # by another number of processes
    assert [path.name for path in again] == ["000003.tar"]
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        *contents(tmp_path / "one"),
        "plan.json",
    ]


@pytest.mark.parametrize("change", [{"seed": 1}, {"rows": ROWS[:4]}, {"options": {"steps": 9}}, {"batch": 3}])
def test_a_folder_of_another_data_set_is_refused(pipe, tmp_path, change):
    plan = {"rows": ROWS[:2], "shard": 2}
    generate_shards(pipe, ShardPlan(**plan), tmp_path)
    with pytest.raises(ValueError, match="shards of another data set, which differs in "):
        generate_shards(pipe, ShardPlan(**{**plan, **change}), tmp_path)


def test_a_wrong_row_is_named_before_any_work(pipe, tmp_path):
    rows = [*ROWS, PromptRow(prompt="a red cat", options={"sampler": "eulr"})]
    with pytest.raises(ValueError, match="prompt 'a red cat': .*eulr"):
        generate_shards(pipe, ShardPlan(rows=rows), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_tables_of_all_kinds(tmp_path):
    tables = {
        "a.txt": "a red apple\n\n  a cat \n",
        "a.csv": 'prompt,seed,steps,guidance\n"a cat, red",3,,1.5\na cat,,2,\n',
        "a.jsonl": '{"prompt": "a cat", "seed": 4, "negative": "red"}\n\n{"prompt": ""}\n',
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompt_table(tmp_path / "a.txt") == [
        PromptRow(prompt="a red apple"),
        PromptRow(prompt="a cat"),
    ]
    assert read_prompt_table(tmp_path / "a.csv") == [
        PromptRow(prompt="a cat, red", seed=3, options={"guidance": 1.5}),
        PromptRow(prompt="a cat", options={"steps": 2}),
    ]
    assert read_prompt_table(tmp_path / "a.jsonl") == [
        PromptRow(prompt="a cat", seed=4, options={"negative": "red"}),
        PromptRow(prompt=""),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,stps\na cat,3\n", "line 2: column 'stps'.*did you mean 'steps'"),
        ("a.csv", "prompt,steps\na cat,many\n", "line 2: steps: expected a number, got 'many'"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: expected a row with a text as its 'prompt'"),
        ("a.txt", "\n", "expected at least one prompt"),
        ("a.md", "a cat\n", "expected a file name that ends in .txt, .csv, .jsonl"),
    ],
)
def test_wrong_tables_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompt_table(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "a.txt"], "--prompts FILE and --out FOLDER: expected both or neither"),
        (["a cat", "--prompts", "a.txt", "--out", "set"], "expected a prompt, or --prompts FILE and --out"),
        ([], "expected a prompt, or --prompts FILE and --out FOLDER"),
    ],
)
def test_the_command_takes_a_prompt_or_a_table(arguments, message, capsys):
    assert main(["generate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_three_processes_of_which_one_is_killed(tmp_path):
    ldm.save(tiny_model(), tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red apple\na cat\na blue cat\n" * 40, encoding="utf-8")
    generate = ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--weights", str(tmp_path / "model")]
    generate += ["--shard", "4", "--batch", "2", "--dtype", "float32", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    one, three = tmp_path / "one", tmp_path / "three"
    alone = [sys.executable, "-m", "ldm", *generate, "--out", str(one)]
    subprocess.run(alone, env=environment, check=True, timeout=600)
    elastic = ["--nproc-per-node", "3", "--max-restarts", "3", "--monitor-interval", "0.1"]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *elastic, *place, "-m", "ldm"]
    process = subprocess.Popen([*torchrun, *generate, "--out", str(three)], env=environment)
    while process.poll() is None and len(list(three.glob("*.tar"))) < 5:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(timeout=600) == 0
    assert len(contents(one)) == 30 and contents(one) == contents(three)
    assert not list(three.glob(".ldm-*"))
