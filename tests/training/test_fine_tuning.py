"""Fine-tuning of loaded models: what moves, exact resumption after a kill, and exports that load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import ROOT, kill_after
from many_processes import free_port
from photos import write_photos
from reduced_families import register
from tiny_exemplars import tiny_exemplar_model
from tiny_latent_diffusion import tiny_model
from tiny_trainings import configs, run, write

import ldm
from ldm.conditioning.conditioner import TextConditioner
from ldm.models.unet import UNet, UNetConfig
from ldm.training.draws import Draws
from ldm.training.losses.common import losses_by_timestep
from ldm.training.recipe import train_recipe
from ldm.training.recomputing import recompute_blocks
from ldm.training.run import open_run
from ldm.weights.formats.safetensors import read_safetensors


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """Write 12 captioned images, and change to the folder above them."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 12)
    return tmp_path


def config(name: str, **changes: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": "photos", "size": 32, "held_out": 0.2}
    return {"part": "fine-tune", "run": run(name, steps=4), "data": data, **changes}


def tiny_sd(family: str = "sd-v1-5") -> str:
    """Write a single file of a small model of a family, and return the name of its card."""
    name = register(family, Path.cwd()).name
    ldm.save(ldm.load(name, weights="random", dtype="float32"), f"{name}.safetensors", layout="original")
    return name


def networks(pipe: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {part: network.state_dict() for part, network in pipe.networks().items()}


def moved(before: Any, after: Any) -> set[str]:
    """Return the parts whose weights differ by more than half precision."""
    old, new = networks(before), networks(after)
    return {part for part, state in old.items() if not near(state, new[part])}


def near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether weights are equal up to half precision."""
    return all(torch.allclose(b[key], value, rtol=1e-3, atol=1e-4) for key, value in a.items())


def test_a_stable_diffusion_is_fine_tuned_from_a_folder_and_loads(work):
    name = tiny_sd()
    path = write(config("tuned", base=name, weights=f"{name}.safetensors"), work / "tuned.yaml")
    folder = train_recipe(path, progress=False)
    before = ldm.load(name, weights=f"{name}.safetensors", dtype="float32")
    after = ldm.load(weights=folder, dtype="float32")
    assert after.card.name == name and moved(before, after) == {"unet"}
    images = after.text_to_image("a photo", steps=2, progress=False)
    assert images.tensor.shape == (1, 3, 32, 32)
    rows = [
        json.loads(line)
        for line in (work / "runs/tuned/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any("validation/loss" in row for row in rows)
    tenths = {key for row in rows for key in row if key.startswith("loss_t")}
    assert len(tenths) > 4 and not any(value != value for row in rows for value in row.values())


@pytest.mark.slow
def test_text_towers_train_too_and_sdxl_reads_its_sizes(work):
    name = tiny_sd("sdxl-base")
    options = {"base": name, "weights": f"{name}.safetensors", "train": ["text2", "unet"]}
    folder = train_recipe(write(config("xl", **options), work / "xl.yaml"), progress=False)
    before = ldm.load(name, weights=f"{name}.safetensors", dtype="float32")
    assert moved(before, ldm.load(weights=folder, dtype="float32")) == {"text2", "unet"}


@pytest.mark.slow
def test_a_model_without_text_is_fine_tuned(work):
    name = tiny_sd("ldm-celebahq")
    options = {"base": name, "weights": f"{name}.safetensors"}
    folder = train_recipe(write(config("faces", **options), work / "faces.yaml"), progress=False)
    assert ldm.load(weights=folder).unconditional(steps=1, progress=False).tensor.shape[0] == 1


def test_v_prediction_with_zero_terminal_snr_is_stated_by_the_export(work):
    name = tiny_sd()
    diffusion = {"prediction": "v", "zero_terminal_snr": True, "offset_noise": 0.1, "min_snr": 5.0}
    options = {"base": name, "weights": f"{name}.safetensors", "diffusion": diffusion}
    folder = train_recipe(write(config("v", **options), work / "v.yaml"), progress=False)
    pipe = ldm.load(weights=folder)
    assert pipe.card.prediction == "v" and pipe.card.schedule.zero_terminal_snr
    assert float(pipe.denoiser.schedule.alphas_cumprod[-1]) == 0
    grid = pipe.card.grids().grid(pipe.denoiser.schedule, 4, pipe.card.defaults.sampler)
    assert float(grid.t[0]) == len(pipe.denoiser.schedule) - 1


def test_a_killed_fine_tuning_resumes_bit_identically(work):
    ldm.save(tiny_model(), work / "model")
    whole = write(config("whole", weights="model", run=run("whole", steps=8)), work / "whole.yaml")
    open_run(whole).train(progress=False)
    halves = write(config("halves", weights="model", run=run("halves", steps=8)), work / "halves.yaml")
    checkpoint = work / "runs/halves/checkpoint.pt"
    for seconds in (2.0, 4.0, 8.0, 16.0, 32.0):
        kill_after(lambda: open_run(halves).train(progress=False), seconds)
        if checkpoint.exists():
            break
    open_run(halves).train(progress=False)
    expected, found = (
        torch.load(work / f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("whole", "halves")
    )
    for part in ("model", "ema"):
        assert expected[part].keys() == found[part].keys()
        assert all(torch.equal(value, found[part][key]) for key, value in expected[part].items())


def test_a_batch_in_parts_has_the_same_gradient(work):
    """Loss, gradient and figures of the first step are those of the whole batch, whatever the parts."""
    ldm.save(tiny_model(), work / "model")
    rows = []
    for parts in (1, 2, 5):
        options = {"steps": 1, "batch": 7, "accumulate": parts}
        path = write(
            config(f"in-{parts}", weights="model", run=run(f"in-{parts}", **options)), work / f"{parts}.yaml"
        )
        open_run(path).train(progress=False)
        text = (work / f"runs/in-{parts}/metrics.jsonl").read_text(encoding="utf-8")
        rows.append(json.loads(text.splitlines()[0]))
    for row in rows[1:]:
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(rows[0][key], rel=1e-4)
        assert row.keys() == rows[0].keys()
    clip = configs(Path("unused"), batch=4, accumulate=2)["clip"]
    clip["data"] = config("any")["data"]
    with pytest.raises(ValueError, match="accumulate: expected 1"):
        open_run(write(clip, work / "clip.yaml")).train(progress=False)
    with pytest.raises(ValueError, match="batch 4: expected at least accumulate 5"):
        open_run(write(config("few", weights="model", run=run("few", accumulate=5)), work / "few.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["ddp", "fsdp"])
def test_two_processes_fine_tune_as_one(work, split):
    """Losses are those of one process up to rounding, and so are nearly all weights and averages.

    AdamW moves weights whose gradient is all rounding by its full step.
    """
    ldm.save(tiny_model(), work / "model")
    options = {"batch": 8, "widths": [0.05, 0.1], "widths_every": 3}
    trained = {"weights": "model", "train": ["unet", "text", "vae_decoder"]}
    one = write(config("one", **trained, run=run("one", **options)), work / "one.yaml")
    train_recipe(one, progress=False)
    several = run("two", **options, accumulate=2, distributed=split)
    write(config("two", **trained, run=several), work / "two.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), "-m", "ldm", "train", "two.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    exports = [f"export/{name}.safetensors" for name in ("unet", "text", "vae")]
    for file in ("averages/0000006.safetensors", *exports):
        expected, found = (read_safetensors(work / "runs" / name / file) for name in ("one", "two"))
        assert expected.keys() == found.keys()
        differences = [
            (found[key].float() - value.float()).abs().flatten() for key, value in expected.items()
        ]
        assert float((torch.cat(differences) > 2e-4).float().mean()) < 0.01
    rows = [
        [
            json.loads(line)
            for line in (work / f"runs/{name}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("one", "two")
    ]
    for a, b in zip(*rows, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "validation/loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_the_decoder_alone_is_fine_tuned(work):
    ldm.save(tiny_model(), work / "model")
    options = {"part": "fine-tune-decoder", "weights": "model", "recompute": True}
    folder = train_recipe(write(config("decoder", **options), work / "decoder.yaml"), progress=False)
    before, after = (ldm.load(weights=each, dtype="float32") for each in ("model", folder))
    assert moved(before, after) == {"vae"}
    for part in ("encoder", "quant_conv"):
        assert near(*(getattr(pipe.vae, part).state_dict() for pipe in (before, after)))


def test_unet_and_decoder_are_fine_tuned_in_one_run(work):
    """Without a common limit of the gradient, the UNet learns what it learns alone."""
    ldm.save(tiny_model(), work / "model")
    settings = run("any", steps=4)
    settings["optimizer"] |= {"clip": 0}
    folders = {}
    for name, trained in (("alone", ["unet"]), ("both", ["unet", "vae_decoder"])):
        options = {"weights": "model", "train": trained, "run": {**settings, "name": name}}
        folders[name] = train_recipe(write(config(name, **options), work / f"{name}.yaml"), progress=False)
    before, alone, both = (ldm.load(weights=each, dtype="float32") for each in ("model", *folders.values()))
    assert moved(before, both) == {"unet", "vae"}
    for key, value in networks(alone)["unet"].items():
        assert torch.equal(value, networks(both)["unet"][key])
    for part in ("encoder", "quant_conv"):
        assert near(*(getattr(pipe.vae, part).state_dict() for pipe in (before, both)))
    text = (work / "runs/both/metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert any("validation/psnr" in row and "validation/loss" in row for row in rows)
    first = next(row for row in rows if "loss_diffusion" in row)
    assert first["loss"] == pytest.approx(first["loss_diffusion"] + first["l1"] + first["mse"], rel=1e-5)


@pytest.mark.parametrize("part", ["unet", "vae", "text"])
def test_another_base_under_a_begun_run_is_refused(work, part):
    ldm.save(tiny_model(), work / "model")
    path = write(config("begun", weights="model"), work / "begun.yaml")
    open_run(path).train(until=2, progress=False)
    changed = tiny_model()
    with torch.no_grad():
        next(changed.networks()[part].parameters()).add_(1)
    ldm.save(changed, work / "model")
    with pytest.raises(ValueError, match=f"begun with other weights of '{part}' than the model has now"):
        open_run(path)
    ldm.save(tiny_model(), work / "model")
    open_run(path).train(progress=False)


def test_cached_texts_train_as_the_towers_do(work, monkeypatch):
    name, losses = tiny_sd(), {}
    base = {"base": name, "weights": f"{name}.safetensors"}
    for cached in (False, True):
        options = {"run": run(f"cached-{cached}", steps=1), "cached_texts": cached}
        path = write(config("any", **base, **options), work / f"{cached}.yaml")
        open_run(path).train(progress=False)
        text = (work / f"runs/cached-{cached}/metrics.jsonl").read_text(encoding="utf-8")
        losses[cached] = [
            json.loads(line)[key]
            for line, key in zip(text.splitlines(), ("loss", "validation/loss"), strict=True)
        ]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    monkeypatch.setattr(TextConditioner, "forward", None)  # nothing is computed again
    again = open_run(path)
    with torch.no_grad(), again.ema.swapped():
        assert again.part.validate()["loss"] == losses[True][1]
    with pytest.raises(ValueError, match="cached_texts: expected false for a text tower that is trained"):
        open_run(write(config("bad", **base, train=["text"], cached_texts=True), work / "bad.yaml"))


def test_captions_are_read_as_they_are(work):
    ldm.save(tiny_model(), work / "model")
    part = open_run(write(config("any", weights="model"), work / "any.yaml")).part
    chosen = part.images.plain(2, seed=0)
    cond = part.cond(["a {cat|red} (apple:1.5)", "a"], chosen)
    assert cond.context is not None and bool(torch.isfinite(cond.context).all())
    plain = part.pipe.text.tokenizer.encode("a {cat|red} (apple:1.5)")
    assert int(cond.context_mask[0].sum()) == len(plain) + 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "name of a model as base"),
        ({"weights": "model", "train": ["text2"]}, "has no 'text2'"),
        ({"weights": "model", "train": []}, "expected different networks"),
        ({"weights": "model", "train": ["vae"]}, "train"),
        ({"weights": "model", "data": {"kind": "folder", "path": "photos", "size": 33}}, "multiple of"),
        ({"weights": "exemplars"}, "no caption names a thing of the model's library"),
    ],
)
def test_what_cannot_be_fine_tuned_is_named(work, changes, message):
    ldm.save(tiny_model(), work / "model")
    ldm.save(tiny_exemplar_model(), work / "exemplars")
    with pytest.raises(ValueError, match=message):
        open_run(write(config("bad", **changes), work / "bad.yaml"))


def test_recomputed_blocks_change_no_gradient():
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=(8, 16), depth=(1, 1), blocks=1, heads=2, context_dim=8))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0])
    cond = ldm.Cond(context=torch.randn(2, 5, 8))

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        net(x, t, cond).square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    kept = gradients()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.numel()) or v, lambda v: v):
        net(x, t, cond)
    assert recompute_blocks(net) > 5
    fewer: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: fewer.append(v.numel()) or v, lambda v: v):
        net(x, t, cond)
    assert sum(fewer) < 0.5 * sum(saved)
    for a, b in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_losses_by_timestep_are_means_of_tenths():
    losses, t = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 99, 999])
    found = losses_by_timestep(losses, t, 1000, Draws(0, range(len(t))))
    assert found["loss_t0"] == 2 and found["loss_t9"] == 5 and found["loss_t5"].isnan()
