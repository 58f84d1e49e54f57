"""Training of IP-Adapters: what a file does when it is loaded is what was trained, here and in diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter_files import same_bits, weights_of
from clip_towers import write_tower
from diffusers_pipelines import STEP, diffusers_pipeline, diffusers_scheduler, seeded_noise
from photos import write_photos
from reduced_families import register
from tiny_exemplars import tiny_exemplar_model
from tiny_trainings import run, write
from torch import Tensor

import ldm
from ldm.training.draws import Draws
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run
from ldm.training.tuning.tuned_model import TunedModel
from ldm.weights.controls.ip_adapter import load_vision
from ldm.weights.formats.safetensors import read_safetensors

BAR = 1e-5  # of the RMS
AFFINE = ("weight", "bias")


def projection_keys(kind: str) -> set[str]:
    """Return the published keys below `image_proj.`"""
    if kind == "base":
        return {f"{name}.{leaf}" for name in ("proj", "norm") for leaf in AFFINE}
    if kind == "full":
        return {f"proj.{i}.{leaf}" for i in (0, 2, 3) for leaf in AFFINE}
    attention = [f"0.{name}.{leaf}" for name in ("norm1", "norm2") for leaf in AFFINE]
    attention += [f"0.{name}.weight" for name in ("to_q", "to_kv", "to_out")]
    feed_forward = ["1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"]
    ends = {f"{name}.{leaf}" for name in ("proj_in", "proj_out", "norm_out") for leaf in AFFINE}
    return {"latents", *ends, *(f"layers.{i}.{name}" for i in range(4) for name in attention + feed_forward)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write 4 captioned images, and change to the folder above them."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 4)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sd")
    name = register("sd-v1-5", folder).name
    path = folder / f"{name}.safetensors"
    ldm.save(ldm.load(name, weights="random", dtype="float32"), path, layout="original")
    return {"base": name, "weights": str(path), "vision": str(write_tower(folder / "tower"))}


def config(name: str, model: dict[str, str], **changes: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": "photos", "size": 32, "least": 8, "held_out": 0}
    made = {"part": "ip-adapter", "run": run(name, steps=4), "data": data, "dtype": "float32"}
    made["run"]["optimizer"]["lr"] = 0.02
    return {**made, **model, **changes}


def loaded(model: dict[str, str]) -> Any:
    return ldm.load(model["base"], weights=model["weights"], device="cpu", dtype="float32")


def drawn(pipe: Any, **options: Any) -> Tensor:
    call = {"steps": 3, "guidance": 3.0, "sampler": "ddim", "progress": False, "height": 32, "width": 32}
    return pipe.text_to_image("a cat", **call, **options).tensor


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@torch.no_grad()
def predicted(part: Any, cond: ldm.Cond, x: Tensor) -> Tensor:
    return part.denoiser.predict(x, torch.full((len(x),), 400.0), cond)


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_what_is_loaded_is_what_was_trained(work: Path, model: dict[str, str], kind: str) -> None:
    path = write(config("ip", model, kind=kind), work / "ip.yaml")
    opened = open_run(path)
    before = weights_of(opened.part.pipe)
    opened.train(progress=False)
    assert same_bits(opened.part.pipe, before)  # the model stays
    file = train_recipe(path, progress=False) / "ip.safetensors"
    keys = {f"image_proj.{name}" for name in projection_keys(kind)}
    layers = len(opened.part.kind.attentions)
    keys |= {f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight" for i in range(layers) for x in "kv"}
    assert set(read_safetensors(file)) == keys
    part = open_run(path).part
    state = torch.load(work / "runs/ip/checkpoint.pt", weights_only=True)["ema"]
    with torch.no_grad():
        for name, parameter in part.model.named_parameters():
            parameter.copy_(state[name])
    pipe = loaded(model)
    control = pipe.controls.load(file, vision=model["vision"])
    trained, read = part.model.state_dict(), control.network.state_dict()
    assert all(torch.equal(value, read[name]) for name, value in trained.items())
    hint = part.images.tensor(part.images.plain(1, seed=0)) / 2 + 0.5
    with torch.no_grad():
        wanted, found = part.kind.prepare(hint)[0], control.kind.prepare(hint)[0]
    assert rms(found - wanted) < BAR * rms(wanted)
    other = drawn(pipe, controls=[("ip", hint.flip(2))])
    images = drawn(pipe, controls=[("ip", hint)])
    assert (images - drawn(pipe)).abs().max() > 4 * STEP and not torch.equal(images, other)
    assert torch.equal(drawn(pipe), drawn(loaded(model)))


def test_a_fresh_adapter_reads_as_the_text_does_and_has_a_gradient(work: Path, model: dict[str, str]) -> None:
    part = open_run(write(config("ip", model), work / "ip.yaml")).part
    net = part.pipe.denoiser.net
    for name, layer in zip(part.kind.attentions, part.model.ip_adapter.values(), strict=True):
        assert torch.equal(layer.to_k_ip.weight, net.get_submodule(name).to_k.weight)
    part.loss(Draws(0, range(4)))[0].backward()
    assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in part.model.parameters())
    assert all(float(p.grad.abs().max()) > 0 for p in part.model.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_gradients_are_the_same_when_blocks_are_computed_again(work: Path, model: dict[str, str]) -> None:
    found = []
    for name, again in (("kept", False), ("again", True)):
        part = open_run(write(config(name, model, recompute=again), work / f"{name}.yaml")).part
        part.loss(Draws(0, range(4)))[0].backward()
        found.append([p.grad for p in part.model.parameters()])
    assert all(rms(a - b) < BAR * rms(a) for a, b in zip(*found, strict=True))


def test_texts_and_images_are_left_out_in_the_shares_that_are_stated(
    work: Path, model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"diffusion": {"drop": 0.5}, "drop_both": 0.2, "drop_image": 0.1}
    part = open_run(write(config("ip", model, **changes), work / "ip.yaml")).part
    n = 2000
    monkeypatch.setattr(part.images, "tensor", lambda samples: torch.zeros(len(samples), 3, 32, 32))
    monkeypatch.setattr(TunedModel, "cond", lambda *_: ldm.Cond())
    with torch.no_grad():
        on, tokens = part.drawn_cond(["a cat", ""] * (n // 2), [None] * n, Draws(0, range(n))).hints
        nothing = part.uncond([None]).hints[1]
    gone = (tokens == nothing).flatten(1).all(1).view(-1, 2).double().mean(0)
    assert bool(on.all())
    # 0.1 of all without the image alone, of the half with a text; 0.2 without both, of the half without
    assert (gone - torch.tensor([0.2, 0.4])).abs().max() < 4 * (0.25 / (n / 2)) ** 0.5


def test_the_loss_falls(work: Path, model: dict[str, str]) -> None:
    made = config("ip", model, diffusion={"drop": 0.0}, drop_both=0.0, drop_image=0.0)
    made["run"] |= {"steps": 40, "optimizer": {"lr": 0.01, "warmup": 1, "weight_decay": 0.0}, "ema": 0.5}
    made["run"] |= dict.fromkeys(("validate_every", "sample_every", "checkpoint_every"), 40)
    opened = open_run(write(made, work / "ip.yaml"))
    losses = []
    for _ in range(2):
        with torch.no_grad():
            losses.append(opened.part.validate()["loss"])
        opened.train(progress=False)
    assert losses[1] < 0.9 * losses[0]


def test_an_interrupted_training_resumes_bit_identically(work: Path, model: dict[str, str]) -> None:
    states = []
    for name, stops in (("whole", ()), ("parts", (1, 3))):
        made = config(name, model)
        made["run"]["checkpoint_every"] = 1
        path = write(made, work / f"{name}.yaml")
        for stop in (*stops, None):
            open_run(path).train(until=stop, progress=False)
        states.append(torch.load(work / f"runs/{name}/checkpoint.pt", weights_only=True)["model"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_diffusers_draws_the_same_image_with_a_trained_adapter(work: Path, model: dict[str, str]) -> None:
    file = train_recipe(write(config("ip", model), work / "ip.yaml"), progress=False) / "ip.safetensors"
    pipe = loaded(model)
    theirs = diffusers_pipeline(copy.deepcopy(pipe), "StableDiffusionPipeline", work)
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(model["vision"]).eval()
    theirs.register_modules(image_encoder=tower)
    theirs.scheduler = diffusers_scheduler(pipe, "ddim")
    theirs.load_ip_adapter(
        str(file.parent),
        subfolder="",
        weight_name=file.name,
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )
    hint = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    wanted = theirs(
        "a cat",
        ip_adapter_image=load_vision(model["vision"], torch.float32).prepare(hint),
        num_inference_steps=3,
        latents=seeded_noise(pipe, 32),
        guidance_scale=3.0,
        output_type="pt",
        height=32,
        width=32,
    ).images
    pipe.controls.load(file, vision=model["vision"])
    found = drawn(pipe, latents=seeded_noise(pipe, 32), controls=[("ip", hint)])
    assert (found - wanted).abs().max() <= STEP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_both": 0.2}, r"drop_both: expected 0 to 0.1, got 0.2"),
        ({"drop_image": -0.1}, "drop_image: expected 0 to 0.9"),
        ({"tokens": 0}, "tokens: expected at least 1"),
        ({"tokens": 4, "kind": "full"}, "expected none for the kind 'full'"),
        ({"vision": "absent"}, "absent"),
        ({"diffusion": {"prediction": "v"}}, "an adapter cannot change it"),
    ],
)
def test_what_cannot_be_trained_is_named(
    work: Path, model: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_run(write(config("bad", model, **changes), work / "bad.yaml"))


def test_a_model_without_a_unet_is_refused(work: Path, model: dict[str, str]) -> None:
    ldm.save(tiny_exemplar_model(), work / "exemplars", dtype="float32")
    made = config("bad", {"vision": model["vision"], "weights": "exemplars"})
    with pytest.raises(ValueError, match="has no UNet with cross-attentions"):
        open_run(write(made, work / "bad.yaml"))
