"""Runs from stage files: early errors, exact resumption, complete exports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killing import in_fresh_process, kill_at_random
from tiny_trainings import configs, write

from ldm.training.checkpoint import match_strides
from ldm.training.diffusion import DiffusionConfig
from ldm.training.draws import Draws
from ldm.training.metrics import thin_rows
from ldm.training.run import open_run, read_training_config
from ldm.weights.formats.ldm_folder import about_part, read_text
from ldm.weights.formats.safetensors import read_safetensors


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """Change to a folder that holds the drawn data set."""
    monkeypatch.chdir(tmp_path)
    return folder


def train(path: Path, **options) -> object:
    run = open_run(path)
    run.train(progress=False, **options)
    return run


def weights(name: str) -> dict[str, torch.Tensor]:
    state = torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)
    return {**state["model"], **{f"ema.{key}": value for key, value in state["ema"].items()}}


def test_every_network_trains_and_the_next_one_reads_its_export(place):
    for name, config in configs(place).items():
        run = train(write(config, Path(f"{name}.yaml")))
        run.export(Path(f"runs/{name}/export"))
        rows = [
            json.loads(line)
            for line in Path(f"runs/{name}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
        assert any(key.startswith("validation/") for row in rows for key in row)
    assert about_part("runs/vae/export", "vae")["latent_scale"] > 0
    assert all(
        t.dtype == torch.float16 for t in read_safetensors("runs/unet/export/unet.safetensors").values()
    )
    assert Path("runs/unet/samples/0000004.png").is_file()
    clip, draft, text = (read_text(f"runs/{name}/export") for name in ("clip", "draft", "unet"))
    assert "kitty" in text.known_words and clip.draft is None
    for before, after in (
        (clip, draft),
        (draft, text),
    ):  # the tower was trained each time
        assert not torch.equal(before.tower.token_embedding.weight, after.tower.token_embedding.weight)
    assert not torch.equal(draft.draft.fc1.weight, text.draft.fc1.weight)
    assert text(["kitty"], size=(4, 12)).concat.shape == (1, 4, 4, 12)


@pytest.mark.parametrize("name", ["vae", "clip", "draft", "unet"])
def test_a_resumed_run_equals_an_uninterrupted_one(place, name):
    made = configs(place)
    needed = {"draft": ["vae", "clip"], "unet": ["vae", "clip", "draft"]}
    for part in needed.get(name, []):
        train(write(made[part], Path(f"{part}.yaml"))).export(Path(f"runs/{part}/export"))
    whole, halves = made[name], {**made[name], "run": {**made[name]["run"], "name": "halves"}}
    train(write(whole, Path("whole.yaml")))
    path = write(halves, Path("halves.yaml"))
    train(path, until=3)
    resumed = train(path)
    assert resumed.step == 6
    expected, got = weights(name), weights("halves")
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    lines = [
        json.loads(line)
        for line in Path("runs/halves/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in lines if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_optimizer_state_of_other_strides_is_laid_out_as_the_weights():
    """A run may resume on a machine whose kernels use other strides; the fused AdamW ignores strides."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(3, 8, 4, 3, 3, generator=generator)
    found = []
    for layouts in (
        (torch.contiguous_format,) * 2,
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ):
        state, weight = None, start
        for layout, gradient in zip(layouts, gradients, strict=True):
            p = torch.nn.Parameter(weight.clone(memory_format=layout))
            optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
            if state is not None:
                optimizer.load_state_dict(state)
                match_strides(optimizer)
            p.grad = gradient.clone(memory_format=layout)
            optimizer.step()
            state, weight = optimizer.state_dict(), p.detach().clone()
        found.append(weight)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_run_killed_at_any_moment_gives_identical_weights(place):
    config = configs(place, steps=60, checkpoint_every=3, validate_every=50)["vae"]
    train(write({**config, "run": {**config["run"], "name": "whole"}}, Path("whole.yaml")))
    path = write(config, Path("vae.yaml"))
    code = f"from ldm.training.run import open_run; open_run({str(path)!r}).train(progress=False)"
    metrics, kills = Path("runs/vae/metrics.jsonl"), 0
    for wanted in (4, 17, 38):  # lines of metrics after which the process is killed
        process = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        )
        while process.poll() is None and (
            not metrics.exists() or len(metrics.read_text(encoding="utf-8").splitlines()) < wanted
        ):
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 3
    train(path)
    expected, got = weights("whole"), weights("vae")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def kill_training(path: str, kills: int) -> int:
    """Kill the training of a stage file at random moments."""
    return kill_at_random(lambda: open_run(path).train(progress=False), kills, 0.5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_every_kill_leaves_a_checkpoint_from_which_the_run_goes_on_exactly(place, kills):
    config = configs(place, steps=100_000, checkpoint_every=2, validate_every=7, sample_every=7)["vae"]
    path = write(config, Path("vae.yaml"))
    assert in_fresh_process(Path(__file__), "kill_training", str(path), kills) == 0  # none ended by itself
    run = open_run(path)
    run.train(until=run.step + 3, progress=False)
    steps = [
        json.loads(line)["step"]
        for line in Path("runs/vae/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert steps == sorted(steps) and set(range(1, run.step + 1)) == set(steps)
    left = [found.name for found in Path("runs/vae").iterdir() if found.name.startswith(".")]
    assert len(left) <= 1, left  # that of the last kill, at most
    whole = write({**config, "run": {**config["run"], "name": "whole"}}, Path("whole.yaml"))
    train(whole, until=run.step)
    expected, got = weights("whole"), weights("vae")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_short_curve_is_kept_and_a_long_one_thinned_evenly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for n in (7, 100, 1000):
        path.write_text(
            "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, n + 1)), encoding="utf-8"
        )
        steps = [json.loads(line)["step"] for line in thin_rows(path).splitlines()]
        assert len(steps) == min(n, 100) and steps[0] == 1 and steps[-1] == n


def test_training_reduces_the_loss(place):
    """300 steps at a high rate halve the error of the first ten."""
    config = configs(
        place, steps=300, log_every=10, validate_every=300, optimizer={"lr": 5e-3, "warmup": 10, "decay": 50}
    )["vae"]
    train(write(config, Path("vae.yaml")))
    losses = [
        row["l1"]
        for row in map(json.loads, Path("runs/vae/metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "l1" in row
    ]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("run", "stps"), 3, "did you mean 'steps'"),
        (("run", "steps"), 0, "steps: expected at least 1, got 0"),
        (("run", "steps"), "many", "run.steps: expected int, got 'many'"),
        (("run", "ema"), 1.0, "ema"),
        (("run", "precision"), "int8", "int8"),
        (("run", "optimizer", "lr"), -1.0, "lr"),
        (("model", "channels"), [], "channels"),
        (("loss", "kl"), float("nan"), "kl"),
        (("data", "mix", "small"), 2.0, "small 2.0"),
        (("part",), "vea", "did you mean 'vae'"),
    ],
)
def test_a_wrong_configuration_is_refused_before_any_work(place, where, value, message):
    config = configs(place)["vae"]
    *path, last = where
    target = config
    for key in path:
        target = target[key]
    target[last] = value
    with pytest.raises(ValueError, match=message):
        read_training_config(write(config, Path("wrong.yaml")))
    assert not Path("runs").exists()


def test_a_run_begins_with_the_weights_of_another(place):
    made = configs(place)
    for name, config in made.items():
        train(write(config, Path(f"{name}.yaml"))).export(Path(f"runs/{name}/export"))
    # nothing is trained: the output is the input, which float16 holds exactly
    still = {"lr": 0.0, "warmup": 1}
    again = {
        "draft": {"text": "runs/draft/export"},
        "unet": {"net": "runs/unet/export", "text": {"folder": "runs/unet/export", "tuned": True}},
    }
    for name, changes in again.items():
        config = {
            **made[name],
            "run": {**made[name]["run"], "name": f"{name}-2", "steps": 1, "optimizer": still},
            **changes,
        }
        train(write(config, Path(f"{name}-2.yaml"))).export(Path(f"runs/{name}-2/export"))
        for file in ("text", "draft", *(["unet"] if name == "unet" else [])):
            before, after = (
                read_safetensors(f"runs/{folder}/export/{file}.safetensors") for folder in (name, f"{name}-2")
            )
            assert before.keys() == after.keys() and all(
                torch.equal(before[key], after[key]) for key in before
            )
    with pytest.raises(ValueError, match="in 'runs/draft/export', this draft is"):
        narrower = {**made["draft"]["model"], "width": 8}
        open_run(
            write({**made["draft"], "text": "runs/draft/export", "model": narrower}, Path("draft-3.yaml")),
            runs="other",
        )
    wider = {**made["draft"]["model"], "width": 1030, "finish": 8}
    wide, own = (
        open_run(
            write({**made["draft"], "text": "runs/draft/export", "model": model}, Path("draft-4.yaml")),
            runs="other",
        ).part.text
        for model in (wider, made["draft"]["model"])
    )
    assert wide.draft.config.width == 1030 and torch.allclose(
        wide(["a cat"]).concat, own(["a cat"]).concat, atol=1e-6
    )
    with pytest.raises(ValueError, match="the unet in 'runs/unet/export' has another shape"):
        wider = {**made["unet"]["model"], "blocks": 2}
        open_run(
            write({**made["unet"], "net": "runs/unet/export", "model": wider}, Path("unet-3.yaml")),
            runs="other",
        )


def test_a_draft_that_does_not_fit_latent_or_network_is_refused(place):
    made = configs(place)
    for part in ("vae", "clip"):
        train(write(made[part], Path(f"{part}.yaml"))).export(Path(f"runs/{part}/export"))
    with pytest.raises(
        ValueError, match="expected 4 channels of size 8, the shape of a latent, got 4 of size 16"
    ):
        open_run(write({**made["draft"], "model": {"embed_dim": 16, "size": 16}}, Path("draft.yaml")))
    with pytest.raises(ValueError, match="embeddings 12 wide, the text tower's are 16"):
        open_run(write({**made["draft"], "model": {"embed_dim": 12, "size": 8}}, Path("draft.yaml")))
    plain = {**made["unet"], "text": {"folder": "runs/clip/export"}}
    with pytest.raises(
        ValueError, match=r"in_channels 8: expected 4, because the latent has 4 and the text tower's draft 0"
    ):
        open_run(write(plain, Path("unet.yaml")))
    with pytest.raises(ValueError, match="prior 1.0: expected 0 for a text tower that is not tuned"):
        read_training_config(
            write({**plain, "text": {"folder": "runs/clip/export", "prior": 1.0}}, Path("unet.yaml"))
        )
    with pytest.raises(ValueError, match="shift: expected a positive number, got 0"):
        read_training_config(write({**plain, "diffusion": {"shift": 0.0}}, Path("unet.yaml")))


def test_the_median_of_shifted_timesteps():
    for shift, median in ((1.0, 500), (3.0, 750), (1 / 3, 250)):  # s·½ / (1 + (s − 1)·½)
        t = DiffusionConfig(shift=shift).draw(Draws(0, range(1000)))
        assert t.shape == (1000,) and t.min() >= 0 and t.max() <= 999
        assert (
            abs(float(t.float().median()) - median) < 2
        )  # stratified: one draw in each thousandth of the distribution


def test_another_configuration_is_refused_but_more_steps_are_not(place):
    config = configs(place)["vae"]
    train(write(config, Path("vae.yaml")), until=2)
    config["run"]["batch"] = 5
    with pytest.raises(ValueError, match=r"step 2 .*differs in run\.batch"):
        open_run(write(config, Path("vae.yaml")))
    config["run"].update(batch=4, steps=9)
    assert train(write(config, Path("vae.yaml"))).step == 9


def test_the_error_for_a_missing_data_set_or_part_names_the_command(place):
    made = configs(place)
    with pytest.raises(FileNotFoundError, match=r"python -m ldm\.data\.emoji"):
        open_run(write({**made["vae"], "data": {"folder": "nowhere"}}, Path("vae.yaml")))
    with pytest.raises(FileNotFoundError, match="no vae in"):
        open_run(write(made["unet"], Path("unet.yaml")))
