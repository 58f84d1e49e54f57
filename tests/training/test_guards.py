"""What must not cost a run its checkpoint: NaN, damage, a second process, a kill at the wrong moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_trainings import configs, write

from ldm.training.run import open_run


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """Change to a folder that holds the drawn data set."""
    monkeypatch.chdir(tmp_path)
    return folder


def vae_file(place, **changes) -> Path:
    return write(configs(place, **changes)["vae"], Path("vae.yaml"))


@pytest.mark.parametrize("steps", [40, 6], ids=["between", "at the last step"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(place, where, steps):
    path = vae_file(place, steps=steps, log_every=20, checkpoint_every=5, validate_every=40)
    run = open_run(path)
    run.train(until=5, progress=False)
    saved = Path("runs/vae/checkpoint.pt").read_bytes()
    before = {key: value.clone() for key, value in run.part.model.state_dict().items()}
    loss = run.part.loss

    def broken(draws):
        value, figures = loss(draws)
        return value * float("nan"), figures

    if where == "loss":
        run.part.loss = broken
    else:
        next(run.part.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError) as caught:
        run.train(progress=False)
    message = str(caught.value)
    name = next(name for name, _ in run.part.model.named_parameters())
    assert message.startswith("step 6: ") and repr(name) in message and "the samples are '" in message
    assert Path("runs/vae/checkpoint.pt").read_bytes() == saved and run.step == 5
    assert all(torch.equal(before[key], value) for key, value in run.part.model.state_dict().items())
    resumed = open_run(path)
    resumed.train(until=min(10, steps), progress=False)
    assert resumed.step == min(10, steps)


def test_until_is_a_step(place):
    with pytest.raises(ValueError, match="until: expected a whole number of at least 1, got 0"):
        open_run(vae_file(place)).train(until=0, progress=False)
    assert not Path("runs/vae/checkpoint.pt").exists()


def test_there_need_be_no_standard_streams(place, monkeypatch):
    """As under pythonw or a service: nothing is shown, and all is computed, cached and exported."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        patch.setattr(sys, "stdout", None)
        for name, config in list(configs(place, steps=2).items())[:3]:  # the third one computes caches
            run = open_run(write(config, Path(f"{name}.yaml")))
            run.train(progress=True)
            run.export(Path(f"runs/{name}/export"))
            assert run.finished
    config = configs(place, steps=2)["vae"]
    shown = open_run(write({**config, "run": {**config["run"], "name": "shown"}}, Path("shown.yaml")))
    shown.train(progress=True)
    silent = torch.load("runs/vae/checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, silent[name]) for name, value in shown.part.model.state_dict().items())


@pytest.mark.parametrize("killed", [2, 4], ids=["between", "the last one"])
def test_a_validation_that_a_kill_prevented_is_made_up_for(place, killed):
    path = vae_file(place, steps=4, checkpoint_every=2, validate_every=2)
    open_run(path).train(until=killed - 1, progress=False)
    run = open_run(path)
    run._validate = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # killed behind the checkpoint
    with pytest.raises(KeyboardInterrupt):
        run.train(until=killed, progress=False)
    assert open_run(path).step == killed
    open_run(path).train(progress=False)
    finished = open_run(path)
    finished.train(progress=False)  # nothing is owed any more
    rows = [
        json.loads(line) for line in Path("runs/vae/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    validated = [row["step"] for row in rows if "validation/psnr" in row]
    assert validated == ([1, 2, 4] if killed == 2 else [2, 3, 4])  # a run that is stopped validates too


def test_a_second_process_is_refused_and_the_lock_ends_with_the_first(place):
    path = vae_file(place)
    run = open_run(path)
    run.folder.mkdir(parents=True)
    code = (
        "import time; from pathlib import Path; from ldm.training.lock import folder_lock\n"
        "with folder_lock(Path('runs/vae')): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8")
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"'runs/vae': another process trains there"):
            run.train(progress=False)
    finally:
        other.kill()
        other.wait()
    run.train(progress=False)
    assert run.finished


def test_a_damaged_checkpoint_is_named(place):
    path = vae_file(place)
    open_run(path).train(until=3, progress=False)
    file = Path("runs/vae/checkpoint.pt")
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = (
        whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 64]) + whole[middle + 64 :]
    )
    for damaged in (flipped, whole[: middle // 2], whole[:100], b"", b"not a checkpoint"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"runs/vae/checkpoint\.pt' is (damaged|not a checkpoint)"):
            open_run(path)
    file.write_bytes(whole)
    assert open_run(path).step == 3
