"""Fine-tuning of loaded unCLIP models: what moves, what it learns, and exports that load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from photos import write_photos
from tiny_exemplars import tiny_exemplar_unclip
from tiny_latent_diffusion import tiny_model
from tiny_trainings import run, write
from tiny_unclip import E, tiny_kandinsky, tiny_kandinsky21, tiny_karlo, tiny_stable
from torch.distributions import Normal, kl_divergence

import ldm
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.unclip.noise_augmentation import AugmentationConfig, NoiseAugmentation
from ldm.pipelines.unclip import UnCLIP
from ldm.training.draws import Draws
from ldm.training.losses.common import variance_loss
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run

MODELS = {
    "karlo": tiny_karlo,
    "stable": tiny_stable,
    "kandinsky-2-1": tiny_kandinsky21,
    "kandinsky-2-2": tiny_kandinsky,
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write 12 captioned images, and change to the folder above them."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 12)
    return tmp_path


def config(name: str, *, steps: int = 4, **changes: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": "photos", "size": 32, "held_out": 0.2}
    own = {"weights": "model", "data": data, "run": run(name, steps=steps)}
    return {"part": "fine-tune-unclip", **own, **changes}


def opened(name: str, path: Path, **changes: Any) -> Any:
    """Return the part of a configuration, ready to train."""
    return open_run(write(config(name, **changes), path / f"{name}.yaml")).part


def saved(make: Callable[[], UnCLIP], path: Path) -> UnCLIP:
    pipe = make()
    ldm.save(pipe, path / "model")
    return pipe


def moved(before: UnCLIP, after: UnCLIP) -> set[str]:
    """Return the parts whose weights differ by more than half precision."""
    new = {part: network.state_dict() for part, network in after.networks().items()}
    assert new.keys() == before.networks().keys()
    return {
        part
        for part, network in before.networks().items()
        if not all(
            torch.allclose(value, new[part][key].float(), rtol=1e-3, atol=1e-4)
            for key, value in network.state_dict().items()
        )
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_is_fine_tuned_from_a_folder_and_loads(work: Path, name: str) -> None:
    before = saved(MODELS[name], work)
    folder = train_recipe(write(config("tuned"), work / "tuned.yaml"), progress=False)
    after = ldm.load(weights=folder, dtype="float32")
    assert moved(before, after) == {"decoder"}
    images = after.variations(Path("photos/0000.png"), n=1, progress=False)
    assert images.tensor.shape == (1, 3, *images.tensor.shape[-2:]) and bool(images.tensor.isfinite().all())
    rows = (work / "runs/tuned/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert any("validation/loss" in json.loads(row) for row in rows)


@pytest.mark.parametrize("name", ["karlo", "stable"])
def test_a_prior_is_fine_tuned_and_nothing_else(work: Path, name: str) -> None:
    before = saved(MODELS[name], work)
    folder = train_recipe(write(config("tuned", train="prior"), work / "tuned.yaml"), progress=False)
    assert moved(before, ldm.load(weights=folder, dtype="float32")) == {"prior"}


@pytest.mark.parametrize(("name", "train"), [("karlo", "decoder"), ("stable", "decoder"), ("karlo", "prior")])
def test_the_loss_of_fixed_noise_falls(work: Path, name: str, train: str) -> None:
    saved(MODELS[name], work)
    path = write(
        config("longer", steps=40, train=train, drop_image=0.0, diffusion={"drop": 0.0}), work / "longer.yaml"
    )
    first = open_run(path).part.validate()["loss"]
    train_recipe(path, progress=False)
    rows = (work / "runs/longer/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [row["validation/loss"] for row in map(json.loads, rows) if "validation/loss" in row][-1]
    assert last < 0.9 * first


@pytest.mark.parametrize("name", ["karlo", "stable", "kandinsky-2-2"])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(work: Path, name: str) -> None:
    saved(MODELS[name], work)
    part, batch = opened("parts", work), range(8)
    whole, _ = part.loss(Draws(0, batch))
    halves = [part.loss(Draws(0, half, batch=batch, passed=4))[0] for half in (range(4), range(4, 8))]
    assert float(sum(halves) / 2) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_training_reads_the_conditions_that_sampling_has(work: Path, name: str) -> None:
    """With the embedding and the caption of an image, and without both, as a pipeline's call states them."""
    pipe = saved(MODELS[name], work)
    part = opened("conditions", work)
    chosen = part.fixed_samples()[:2]
    vectors, n = part.embed(chosen), len(chosen)
    side = part.tuning.side
    call = pipe.settle(["a red disc", "ap"], n=1, height=side, width=side, progress=False)
    embedding = ImageEmbedding(vector=vectors, clip=pipe.clip.name)
    cond, uncond = pipe.conditions_of(call, embedding)
    on = torch.ones(n, dtype=torch.bool)
    own = part.tuning.cond(call.texts, vectors, Draws(0, range(n)), on)
    without = part.tuning.cond([""] * n, vectors, Draws(0, range(n)), ~on)
    assert [key for key, _ in own.items()] == [key for key, _ in cond.items()]
    for found, expected in ((own, cond), (without, uncond.expand(n))):
        for (key, value), (_, wanted) in zip(found.items(), expected.items(), strict=True):
            if key == "pooled" and found is own and name == "stable":
                assert value.shape == wanted.shape and not torch.equal(value, wanted)  # another noise level
            else:
                assert torch.allclose(value.float(), wanted.float(), atol=1e-5), key


def test_a_decoder_of_pixels_sees_small_images_and_clip_large_ones(work: Path) -> None:
    saved(tiny_karlo, work)
    part = opened("pixels", work)
    chosen = part.fixed_samples()
    assert part.images.tensor(chosen).shape[-2:] == (32, 32)
    assert part.tuning.fixed(chosen, part.embed(chosen)).shape == (len(chosen), 3, 16, 16)


def test_another_image_tower_has_embeddings_of_its_own(work: Path) -> None:
    pipe = saved(tiny_karlo, work)
    first = opened("first", work).embeddings[[0]]
    with torch.no_grad():
        pipe.clip.vision.proj.mul_(2)
    ldm.save(pipe, work / "model")
    assert torch.allclose(opened("second", work).embeddings[[0]], 2 * first, rtol=1e-2)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (tiny_karlo, {"weights": None}, "name of a model as base"),
        (tiny_karlo, {"train": "vision"}, "vision"),
        (tiny_karlo, {"drop_image": 1.5}, "drop_image"),
        (tiny_karlo, {"data": {"kind": "folder", "path": "photos", "size": 8}}, "at least 16"),
        (tiny_stable, {"data": {"kind": "folder", "path": "photos", "size": 33}}, "multiple of 2"),
        (tiny_karlo, {"train": "prior", "diffusion": {"prediction": "v"}}, "prior's own prediction"),
        (lambda: tiny_kandinsky(9), {}, "known part of an image"),
        (tiny_exemplar_unclip, {}, "pipe.exemplars.add"),
        (tiny_model, {}, "expected an unCLIP model, got a LatentDiffusion"),
    ],
)
def test_what_cannot_be_fine_tuned_is_named(
    work: Path, make: Callable[[], Any], changes: dict[str, Any], message: str
) -> None:
    ldm.save(make(), work / "model")
    with pytest.raises(ValueError, match=message):
        opened("bad", work, **changes)


def test_a_model_without_prior_and_an_unclip_model_elsewhere_are_named(work: Path) -> None:
    pipe = tiny_karlo()
    pipe.prior, pipe.card = None, replace(pipe.card, prior=None)
    ldm.save(pipe, work / "model")
    with pytest.raises(ValueError, match="has no prior"):
        opened("bad", work, train="prior")
    with pytest.raises(ValueError, match="fine-tune-unclip"):
        open_run(write(config("other") | {"part": "fine-tune"}, work / "other.yaml"))


def test_the_divergence_of_a_step_is_that_of_two_normal_distributions() -> None:
    schedule = NoiseSchedule.cosine(50)
    t = torch.tensor([1, 7, 49])
    g = torch.Generator().manual_seed(0)
    x0, made = (torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    frac = torch.rand(3, 2, 4, 4, generator=g, dtype=torch.float64)
    found = variance_loss(schedule, x0, made, frac, t)
    x_t = torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64)
    for i, step in enumerate(t.tolist()):
        kept, before = (float(schedule.alphas_cumprod[k]) for k in (step, step - 1))
        beta = 1 - kept / before
        small = beta * (1 - before) / (1 - kept)
        # Ho et al. 2020, eq. 7
        true, guess = (
            before**0.5 * beta / (1 - kept) * x[i]
            + (kept / before) ** 0.5 * (1 - before) / (1 - kept) * x_t[i]
            for x in (x0, made)
        )
        variance = beta ** frac[i] * small ** (1 - frac[i])
        q, p = Normal(true, torch.full_like(true, small**0.5)), Normal(guess, variance.sqrt())
        bits = kl_divergence(q, p).mean() / torch.tensor(2.0, dtype=torch.float64).log()
        assert float(found[i]) == pytest.approx(float(bits), rel=1e-9)


def test_an_exact_prediction_with_the_posteriors_variance_has_no_divergence() -> None:
    schedule, x0 = NoiseSchedule.linear(20), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0, 12])
    assert float(variance_loss(schedule, x0, x0, torch.zeros_like(x0), t).abs().max()) < 1e-6
    assert float(variance_loss(schedule, x0, x0 + 1, torch.zeros_like(x0), t).min()) > 0


def test_embeddings_are_noised_to_levels_of_their_own() -> None:
    augmentation = NoiseAugmentation(AugmentationConfig(embed_dim=E))
    vectors, noise = torch.randn(3, E), torch.randn(3, E)
    levels = torch.tensor([0, 500, 999])
    each = torch.cat([augmentation(vectors[[i]], int(levels[i]), noise[[i]]) for i in range(3)])
    assert torch.equal(augmentation(vectors, levels, noise), each)
    with pytest.raises(ValueError, match="expected 0 to 999"):
        augmentation(vectors, torch.tensor([0, 1, 1000]), noise)
