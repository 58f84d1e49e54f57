"""`torchrun -m ldm train`: restarts after kills, and one error for all processes."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killing import in_fresh_process
from many_processes import free_port, run_together
from tiny_trainings import configs, unclip_configs, write

from ldm.training.distributed.group import joined_processes
from ldm.training.recipe import find_stage
from ldm.training.run import open_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """Change to a folder that holds the drawn data set."""
    monkeypatch.chdir(tmp_path)
    return folder


def torchrun(size: int, *arguments: str, restarts: int = 0, **options) -> subprocess.Popen:
    """Start `torchrun -m ldm` with arguments."""
    elastic = ["--nproc-per-node", str(size), "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    port = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *elastic, *port, "-m", "ldm", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment, **{**pipes, **options})


def workers(agent: int) -> list[int]:
    """Return the processes that torchrun has started and that still run."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text(encoding="ascii").split()
    return [int(child) for child in children]


def vae_file(place, name: str, **changes) -> Path:
    quiet = {"log_every": 5, "validate_every": 1000, "sample_every": 1000, "checkpoint_every": 5}
    config = configs(place, **{**quiet, **changes})["vae"]
    return write({**config, "run": {**config["run"], "name": name}}, Path(f"{name}.yaml"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    run = open_run(path)
    averages = {f"ema.{name}": value for name, value in run.ema.state_dict().items()}
    return {**run.part.model.state_dict(), **averages}


@pytest.mark.parametrize("split", ["ddp", "fsdp"])
def test_two_processes_train_and_export_what_one_does(place, split):
    together = vae_file(place, "together", steps=10, distributed=split)
    process = torchrun(2, "train", str(together))
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    assert printed.splitlines()[-1] == "runs/together/export" and printed.count("stage") == 1
    assert Path("runs/together/export/vae.safetensors").is_file()
    alone = vae_file(place, "alone", steps=10)
    open_run(alone).train(progress=False)
    one, two = weights(alone), weights(together)
    assert one.keys() == two.keys()
    # where a gradient is near zero, AdamW turns its rounding into steps of up to the rate, here 1e-3
    differences = {name: one[name] - two[name] for name in one}
    worst = max(float(value.abs().max()) for value in differences.values())
    assert worst < 5e-3 and norm(differences) < 1e-3 * norm(one)


def norm(values: dict[str, torch.Tensor]) -> float:
    return sum(float(value.square().sum()) for value in values.values()) ** 0.5


def test_an_error_of_all_is_printed_once(place):
    process = torchrun(2, "train", str(vae_file(place, "small", steps=4, batch=1)))
    _, errors = process.communicate(timeout=500)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert lines == ["error: batch 1: expected at least accumulate 1 times the number of processes, 2"]
    assert process.returncode != 0


@pytest.mark.slow
def test_a_full_disk_ends_with_one_error_and_keeps_the_checkpoint(place):
    path = vae_file(place, "full", steps=10, distributed="fsdp")
    assert torchrun(2, "train", str(path), "--until", "5").wait(timeout=500) == 0
    before = weights(path)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    process = torchrun(2, "train", str(path), preexec_fn=fill)
    _, errors = process.communicate(timeout=500)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "cannot write 'runs/full/checkpoint-0000010'" in lines[0], errors[-3000:]
    assert open_run(path).step == 5
    assert all(torch.equal(value, before[name]) for name, value in weights(path).items())


@pytest.mark.slow
def test_a_lost_process_ends_with_one_error_where_nothing_restarts(place):
    path = vae_file(place, "lost", steps=100_000)
    process = torchrun(2, "train", str(path))
    wait_for_checkpoint(process, Path("runs/lost"))
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=500)
    assert process.returncode != 0 and "Traceback" not in errors.split("torch/distributed")[0]
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) <= 1
    assert open_run(path).step >= 5  # the checkpoint is intact


def wait_for_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    while process.poll() is None and not list(folder.glob("checkpoint-*/state.json")):
        time.sleep(0.05)
    assert process.poll() is None


@pytest.mark.slow
def test_ten_kills_of_workers_change_nothing(place):
    whole = vae_file(place, "whole", steps=150)
    assert torchrun(2, "train", str(whole)).wait(timeout=900) == 0
    path = vae_file(place, "killed", steps=150)
    process = torchrun(2, "train", str(path), restarts=20)
    rng, kills, metrics = random.Random(0), 0, Path("runs/killed/metrics.jsonl")
    while kills < 10:
        wanted = (kills + 1) * 150 // 12 - 5 * rng.random()  # steps logged before the next kill
        while process.poll() is None and last_step(metrics) < wanted:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, process.communicate()[1][-3000:]
        os.kill(rng.choice(workers(process.pid)), signal.SIGKILL)
        kills += 1
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-3000:]
    expected, found = weights(whole), weights(path)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def last_step(metrics: Path) -> int:
    found = re.findall(r'"step": (\d+)', metrics.read_text(encoding="utf-8")) if metrics.exists() else []
    return int(found[-1]) if found else 0


def train_parts(data: str, folder: str, split: str) -> dict[str, list[int]]:
    """Train each part by two processes, one after the other; return their exit statuses."""
    os.chdir(folder)
    made = {**configs(Path(data)), **unclip_configs(Path(data))}
    return {
        name: run_together(2, lambda c=config, n=name: train_part(c, n, split))  # type: ignore[misc]
        for name, config in made.items()
    }


def train_part(config: dict, name: str, split: str) -> None:
    changes = {"steps": 2, "validate_every": 2, "sample_every": 2, "distributed": split}
    path = Path(f"{name}.yaml")
    with joined_processes("cpu") as processes:
        processes.once(lambda: write({**config, "run": {**config["run"], **changes}}, path))
        assert find_stage(path).train(progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["ddp", "fsdp"])
def test_every_part_is_trained_and_exported_by_two_processes(place, split):
    statuses = in_fresh_process(Path(__file__), "train_parts", str(place), str(Path.cwd()), split)
    assert {name for name, each in statuses.items() if any(each)} == set()
    assert Path("runs/decoder/export/decoder.safetensors").is_file()
