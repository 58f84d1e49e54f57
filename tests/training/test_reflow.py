"""Distillation by reflow: the pairs, what the student learns, exact resumption, and a model that loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_latent_diffusion import tiny_model
from tiny_trainings import run, write

import ldm
from ldm.diffusion.noise import initial_noise
from ldm.registry.bundling import bundle
from ldm.training.caches import pairs as pairs_module
from ldm.training.caches.pairs import teacher_pairs
from ldm.training.draws import Draws
from ldm.training.run import open_run

PROMPTS = ("a red apple", "cat", "apple on blue background")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Change to a folder that holds a tiny model and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    ldm.save(tiny_model(), "teacher")
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    return tmp_path


def config(**changes: Any) -> dict[str, Any]:
    return {
        "part": "reflow",
        "run": run(**{"name": "turbo", **changes.pop("run", {})}),
        "teacher": {"weights": "teacher", "guidance": 3.0},
        "prompts": "prompts.txt",
        "pairs": 80,
        **changes,
    }


def opened(**changes: Any):
    return open_run(write(config(**changes), Path("turbo.yaml")))


def test_pairs_are_the_images_of_their_seeds(place):
    pipe = ldm.load(weights="teacher", dtype="float32")
    prompts = [PROMPTS[i % 3] for i in range(5)]
    pairs = teacher_pairs(pipe, prompts, batch=2, guidance=3.0)
    for i, prompt in enumerate(prompts):
        image = pipe.text_to_image(prompt, seed=i, guidance=3.0, progress=False).tensor
        torch.testing.assert_close(pipe.decode(pairs.latent([i])), image, atol=2e-3, rtol=0)
        assert torch.equal(pairs.noise([i]), initial_noise([i], pairs.latents.shape[1:]))


def test_an_interrupted_computation_of_pairs_resumes_where_it_stopped(place, monkeypatch):
    monkeypatch.setattr(pairs_module, "SHARD", 2)
    pipe = ldm.load(weights="teacher", dtype="float32")
    drawn, draw = [], pairs_module.draw_latents

    def failing(pipe, prompts, seeds, **options):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(list(seeds))
        return draw(pipe, prompts, seeds, **options)

    monkeypatch.setattr(pairs_module, "draw_latents", failing)
    with pytest.raises(KeyboardInterrupt):
        teacher_pairs(pipe, PROMPTS * 2)
    monkeypatch.setattr(
        pairs_module, "draw_latents", lambda *a, **k: drawn.append(list(a[2])) or draw(*a, **k)
    )
    resumed = teacher_pairs(pipe, PROMPTS * 2)
    assert drawn == [[0, 1], [2, 3], [4, 5]]
    again = teacher_pairs(pipe, PROMPTS * 2)
    assert len(drawn) == 3 and np.array_equal(again.latents, resumed.latents)
    pipe.origin = {"unet": "other weights"}
    teacher_pairs(pipe, PROMPTS * 2)
    assert len(drawn) == 6


def test_timesteps_are_those_of_the_grids(place):
    part = opened(grids=[1, 2, 4]).part
    t = part.timesteps(Draws(0, range(6000)))
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [249, 499, 749, 999]
    expected = torch.tensor([1 / 12, 1 / 12 + 1 / 6, 1 / 12, 1 / 3 + 1 / 6 + 1 / 12]) * 6000
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_the_loss_is_that_of_the_pair_with_its_own_noise(place):
    part = opened().part
    rows, t = [3, 4], torch.tensor([999.0, 499.0])
    with torch.no_grad():
        losses = part.losses(rows, t)
    pipe, schedule = part.teacher, part.denoiser.schedule
    for i, row in enumerate(rows):
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(t[i]))
        x0, eps = part.pairs.latent([row]), initial_noise([row], part.pairs.latents.shape[1:])
        cond = pipe.text([PROMPTS[row % 3]], size=x0.shape[-2:], seeds=[row])
        with torch.no_grad():
            raw = part.net(alpha * x0 + sigma * eps, t[i : i + 1], cond)
        wanted = (raw - (alpha * eps - sigma * x0)).square().mean()
        assert float(losses[i]) == pytest.approx(float(wanted), rel=1e-4)


def test_a_student_of_one_step_comes_near_the_images_of_the_teacher(place):
    steps = 100
    optimizer = {"kind": "muon", "lr": 4e-3, "warmup": 10, "decay": 80}
    often = dict.fromkeys(("log_every", "checkpoint_every", "validate_every", "sample_every"), steps)
    run = {"steps": steps, "batch": 16, "ema": 0.95, "optimizer": optimizer, **often}
    trained = opened(pairs=576, grids=[1], run=run)
    before = trained.part.validate()["error_1"]
    trained.train(progress=False)
    with trained.ema.swapped():
        assert trained.part.validate()["error_1"] < 0.5 * before


def test_training_is_resumed_exactly(place):
    whole = opened()
    whole.train(progress=False)
    opened(run={"name": "halves"}).train(until=4, progress=False)
    halves = opened(run={"name": "halves"})
    assert halves.step == 4
    halves.train(progress=False)
    for a, b in zip(whole.part.model.parameters(), halves.part.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_student_takes_the_place_of_the_unet(place):
    trained = opened(grids=[1])
    trained.train(progress=False)
    trained.export(Path("runs/turbo/export"))
    pipe = ldm.load(weights="teacher", dtype="float32")
    defaults = replace(pipe.card.defaults, sampler="ddim", steps=1, guidance=1.0)
    parts = {**dict.fromkeys(("vae", "text", "draft"), "teacher"), "unet": "runs/turbo/export"}
    bundle(replace(pipe.card, name="turbo", defaults=defaults), parts, "student")
    image = ldm.load(weights="student", dtype="float32").text_to_image("cat", seed=4, progress=False)
    assert image.recipe["steps"] == 1
    assert not torch.equal(image.tensor, pipe.text_to_image("cat", seed=4, progress=False).tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 64}, "pairs: expected at least 65, got 64"),
        ({"prompts": None}, "expected one of prompts and data"),
        ({"grids": []}, "grids: expected numbers of steps of at least 1"),
        ({"teacher": {}}, "expected model or weights, or a card with parts"),
        ({"teacher": {"weights": "teacher", "card": "card.yaml"}}, "expected model or weights, or a card"),
        ({"prediction": "eps"}, "prediction 'eps'"),
        ({"prompts": "empty.txt"}, "expected a prompt in each line"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(place, change, message):
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        opened(**{"pairs": 66, **change})
