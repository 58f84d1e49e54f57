"""Several processes train as one does: the same samples, and the same weights up to the order of sums."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from killing import in_fresh_process
from many_processes import run_together, start_together
from tiny_part import TinyPart, tiny_config

from ldm.training.distributed.group import joined_processes
from ldm.training.distributed.meeting import own_part
from ldm.training.distributed.processes import Processes
from ldm.training.draws import Draws
from ldm.training.loop import Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
HERE = Path(__file__)


class Share(Processes):
    """One of several processes, without communication."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def open_tiny(folder: str, processes: Processes, **changes: object) -> Run:
    config = tiny_config(**changes)
    return Run(TinyPart(), config.run, config, Path(folder), torch.device("cpu"), processes)


def train_tiny(folder: str, changes: dict, until: int | None = None) -> None:
    """Train in the processes that were started, and note which samples each has seen."""
    with joined_processes("cpu") as processes:
        run = open_tiny(folder, processes, **changes)
        run.train(until=until, progress=False)
        seen = Path(folder) / f"seen-{processes.size}-{processes.rank}.json"
        seen.write_text(json.dumps(run.part.seen), encoding="utf-8")


def train_in(size: int, folder: str, changes: dict, until: int | None = None) -> list[int]:
    """Train in several processes; return their exit statuses."""
    return run_together(size, lambda: train_tiny(folder, changes, until))


def weights(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Return weights and averages of the last checkpoint, of either kind."""
    changes = {"steps": steps, "validate_every": 1, "optimizer": kind_of(folder)}
    run = open_tiny(str(folder), Processes(), **changes)
    assert run.step == steps
    state = run.part.model.state_dict()
    return {**state, **{f"ema.{name}": value for name, value in run.ema.state_dict().items()}}


def kind_of(folder: Path) -> dict:
    return {"kind": "muon" if "muon" in folder.name else "adamw"}


def rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics without times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timed = ("seconds", "samples_per_second")
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def assert_same(one: Path, other: Path, within: float, steps: int = 50) -> None:
    a, b = weights(one, steps), weights(other, steps)
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= within
    for row, same in zip(rows(one), rows(other), strict=True):
        assert row == pytest.approx(same, rel=within, abs=within)


def test_a_batch_does_not_depend_on_the_number_of_processes():
    for size in (2, 3, 7):
        whole = Draws.of_step(3, 5, 7)
        shares = [Draws.of_step(3, 5, 7, Share(rank, size)) for rank in range(size)]
        assert [sample for share in shares for sample in share.samples] == list(range(35, 42))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for draw in (lambda each: each.normal(len(each), 2, 3), lambda each: each.places):
            assert torch.equal(torch.cat([draw(share) for share in shares]), draw(whole))
        assert np.array_equal(np.concatenate([share.random() for share in shares]), whole.random())


def test_samples_draw_different_numbers():
    drawn = np.concatenate([Draws.of_step(seed, step, 50).random() for seed in (0, 1) for step in (0, 1)])
    other = Draws(0, range(50), stream=1).random()
    assert len(np.unique(np.concatenate([drawn, other]))) == 250


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_restarted_processes_do_not_read_what_those_before_them_have_left(order):
    """torchrun keeps one store for all restarts."""
    store = dist.HashStore()
    for _ in range(2):
        found: dict[int, dist.Store] = {}

        def meet(rank: int, found=found) -> None:
            found[rank] = own_part(store, rank, 3, seconds=20)

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        found[order[0]].set("word", "said")
        assert all(found[rank].get("word") == b"said" for rank in range(3))
        for rank in range(3):
            assert found[rank].add("failures", 1) == rank + 1  # not those of the processes before


def test_a_process_that_the_others_leave_alone_says_so():
    store = dist.HashStore()
    store.set("ldm/name-1", "of a process that was killed")
    with pytest.raises(TimeoutError, match="process 0 of 2: the others have not come within 0 seconds"):
        own_part(store, 0, 2, seconds=0.3)


FSDP = {"distributed": "fsdp"}
MUON = {"optimizer": {"kind": "muon"}}
RUNS = {  # for each run its parts, one after the other: number of processes, configuration, last step
    "one": [(1, {}, None)],
    "ddp-3": [(3, {}, None)],  # shares of 2, 3 and 3 samples
    "fsdp-2": [(2, FSDP, None)],
    "fsdp-2-1-4": [(2, FSDP, 4), (1, {}, 8), (4, {}, None)],
}
SLOW_RUNS = {
    "one": [(1, {}, None)],
    "ddp-2": [(2, {}, None)],
    "ddp-4": [(4, {}, None)],
    "fsdp-2": [(2, FSDP, None)],
    "fsdp-4": [(4, FSDP, None)],
    "ddp-2-1-4": [(2, {}, 20), (1, {}, 40), (4, {}, None)],
    "fsdp-2-1-4": [(2, FSDP, 20), (1, {}, 40), (4, FSDP, None)],
    "muon": [(1, MUON, None)],
    "muon-fsdp": [(2, {**MUON, **FSDP}, None)],
}


def train_all(folder: str, runs: dict, steps: int, every: int) -> list[str]:
    """Train runs in other processes; return the names of those that failed."""
    shared = {"steps": steps, "validate_every": every}
    return [
        name
        for name, parts in runs.items()
        for size, changes, until in parts
        if any(train_in(size, f"{folder}/{name}", {**changes, **shared}, until))
    ]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    assert in_fresh_process(HERE, "train_all", str(folder), RUNS, 12, 4) == []
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert in_fresh_process(HERE, "train_all", str(folder), SLOW_RUNS, 50, 20) == []
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one"])
def test_processes_train_as_one(short, name):
    assert_same(short / "one", short / name, 1e-12, steps=12)


def samples_of(folder: Path, size: int, steps: int) -> list[int]:
    """Return the samples that processes have seen, step by step, those of the first process first."""
    files = [folder / f"seen-{size}-{rank}.json" for rank in range(size)]
    shares = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    each = [len(share) // steps for share in shares]
    return [
        sample
        for step in range(steps)
        for share, n in zip(shares, each, strict=True)
        for sample in share[n * step : n * (step + 1)]
    ]


def test_the_samples_are_those_of_one_process_in_order(short):
    assert samples_of(short / "ddp-3", 3, 12) == list(range(8 * 12))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-1", "ddp-2", "ddp-4", "fsdp-2", "fsdp-4"])
def test_the_samples_of_fifty_steps_are_the_same_in_the_same_order(whole, name):
    assert samples_of(whole / name.removesuffix("-1"), int(name[-1]), 50) == list(range(8 * 50))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLOW_RUNS if "-" in name and "muon" not in name])
def test_processes_train_as_one_for_fifty_steps(whole, name):
    assert_same(whole / "one", whole / name, 1e-12)


@pytest.mark.slow
def test_a_sharded_matrix_is_orthogonalized_as_a_whole(whole):
    assert_same(whole / "muon", whole / "muon-fsdp", 1e-5)  # iterations in float32


def kill_ten_times(folder: str) -> bool:
    """Kill one of two processes ten times at random moments, restart both; return if nothing has changed."""
    changes = {"steps": 150, "validate_every": 50, "checkpoint_every": 5, **FSDP}
    killed, rng = Path(folder) / "killed", random.Random(0)
    train_in(2, f"{folder}/whole", changes)
    for kill in range(10):
        processes = start_together(2, lambda: train_tiny(str(killed), changes))
        wanted = 13 * (kill + 1) - rng.uniform(0, 6)
        while not (killed / "metrics.jsonl").exists() or rows(killed)[-1]["step"] < wanted:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(rng.choice(processes), signal.SIGKILL)
        for process in processes:
            os.waitpid(process, 0)
    train_in(2, str(killed), changes)
    one, other = (weights(Path(folder) / name, 150) for name in ("whole", "killed"))
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_ten_kills_and_restarts_change_nothing(tmp_path):
    assert in_fresh_process(HERE, "kill_ten_times", str(tmp_path))
