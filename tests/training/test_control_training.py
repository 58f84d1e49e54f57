"""Training of ControlNets: what a file does when it is loaded is what was trained, here and in diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adapter_files import same_bits, weights_of
from diffusers_pipelines import STEP, diffusers_pipeline, seeded_noise
from photos import write_photos
from PIL import Image
from reduced_families import register
from tiny_exemplars import CELL, SIZE, tiny_exemplar_model
from tiny_trainings import run, write
from torch import Tensor

import ldm
from ldm.images.hints import canny
from ldm.images.pixels import to_pixels
from ldm.models.control.controlled import Controlled
from ldm.pipelines.control.hinted_layouts import hinted_condition
from ldm.registry.inspection import inspect
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run
from ldm.weights.formats.safetensors import read_safetensors

BAR = 1e-5  # of the RMS


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
    return {"base": name, "weights": str(path)}


@pytest.fixture
def exemplars(work: Path) -> dict[str, str]:
    """Write a model with exemplars and images of its things."""
    ldm.save(tiny_exemplar_model(), work / "exemplars", dtype="float32")
    write_photos(work / "photos", 4, width=SIZE, height=SIZE)
    for path in (work / "photos").glob("*.txt"):
        path.write_text("a cat", encoding="utf-8")
    return {"weights": "exemplars"}


def config(name: str, size: int = 32, **changes: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": "photos", "size": size, "least": 8, "held_out": 0}
    made = {"part": "control-net", "run": run(name, steps=4), "data": data, "dtype": "float32", **changes}
    made["run"]["optimizer"]["lr"] = 0.01
    return made


def loaded(model: dict[str, str]) -> Any:
    return ldm.load(model.get("base"), weights=model["weights"], device="cpu", dtype="float32")


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def drawn(pipe: Any, side: int, prompt: str = "a cat", **options: Any) -> Tensor:
    call = {"steps": 3, "guidance": 3.0, "sampler": "ddim", "progress": False, "height": side, "width": side}
    return pipe.text_to_image(prompt, **call, **options).tensor


@torch.no_grad()
def loss_of(part: Any) -> float:
    return float(part.validate()["loss"])


@pytest.mark.parametrize("kind", ["model", "exemplars"])
def test_a_fresh_control_changes_nothing_and_has_a_gradient(
    work: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(kind)
    part = open_run(write(config("edges", 32 if kind == "model" else SIZE, **base), work / "e.yaml")).part
    samples = part.images.plain(2, seed=0)
    cond = part.cond(part.images.describe(samples), samples, range(2))
    x = torch.randn(2, *part.latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = part.denoiser.predict(x, torch.tensor([400.0, 10.0]), cond)
    plain = part.pipe.denoiser.predict(x, torch.tensor([400.0, 10.0]), ldm.Cond.of(without_hints(cond)))
    assert rms(found - plain) < BAR * rms(plain)
    with torch.no_grad():  # residuals that are not zero show what the rest of the copy does
        for name, p in part.model.named_parameters():
            if name.startswith(
                ("controlnet_down", "controlnet_mid", "control_blocks", "controlnet_cond_emb", "head.proj")
            ):
                p.add_(0.05)
    part.denoiser.predict(x, torch.tensor([400.0, 10.0]), part.cond([""] * 2, samples)).sum().backward()
    gradients = {name: p.grad for name, p in part.model.named_parameters()}
    assert all(bool(g is not None and g.isfinite().all()) for g in gradients.values())
    assert all(p.grad is None for p in part.pipe.denoiser.net.parameters())


def without_hints(cond: ldm.Cond) -> dict[str, Tensor]:
    return {name: value for name, value in cond.items() if not name.startswith("hints.")}


@pytest.mark.parametrize("kind", ["model", "exemplars"])
def test_what_is_loaded_is_what_was_trained(work: Path, kind: str, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(kind)
    side = 32 if kind == "model" else SIZE
    path = write(config("canny", side, **base), work / "canny.yaml")
    opened = open_run(path)
    before = weights_of(opened.part.pipe)
    opened.train(progress=False)
    assert same_bits(opened.part.pipe, before)  # the model stays
    file = train_recipe(path, progress=False) / "canny.safetensors"
    part = open_run(path).part
    state = torch.load(work / "runs/canny/checkpoint.pt", weights_only=True)["ema"]
    with torch.no_grad():
        for name, parameter in part.model.named_parameters():
            parameter.copy_(state[name])
    pipe = loaded(base)
    control = pipe.controls.load(file)
    assert control.card.name == "canny"
    samples = part.images.plain(1, seed=0)
    hint = canny(part.images.tensor(samples) / 2 + 0.5)
    assert bool(hint.any())
    cond = part.cond(part.images.describe(samples), samples)
    x, t = torch.randn(1, *part.latents.shape), torch.tensor([400.0])
    with torch.no_grad():
        wanted = part.denoiser.predict(x, t, cond)
        plain = pipe.denoiser.predict(x, t, ldm.Cond.of(without_hints(cond)))
        own = Controlled(pipe.denoiser.net, part.controlled.net.parts)
        own.parts = tuple(ldm_part(each, control.kind) for each in own.parts)
        found = own(x, pipe.denoiser.schedule.network_time(t), cond)
    assert rms(found - wanted) < BAR * rms(wanted) < rms(plain - wanted)
    images = drawn(pipe, side, controls=[ldm.Control("canny", hint)])
    assert not torch.equal(images, drawn(pipe, side))
    assert torch.equal(drawn(pipe, side), drawn(loaded(base), side))


def ldm_part(part: Any, kind: Any) -> Any:
    changed = copy.copy(part)
    object.__setattr__(changed, "kind", kind)
    return changed


def test_a_model_with_exemplars_is_shown_the_layout_of_a_call(
    work: Path, exemplars: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(config("mine", SIZE, **exemplars), work / "mine.yaml")
    part = open_run(path).part
    samples = part.images.plain(4, seed=0)
    found = part.cond(part.images.describe(samples), samples).exemplars
    pipe = loaded(exemplars)
    for i, sample in enumerate(samples):
        lines = canny(part.images.tensor([sample]) / 2 + 0.5)[:, :1]
        wanted = hinted_condition(pipe.text, "a cat", 0, lines, (SIZE // CELL,) * 2).exemplars
        assert (found[i] - wanted[0]).abs().max() < 1e-3  # kept in float16

    def refused(*_: object) -> None:
        raise AssertionError("it was fitted before")

    monkeypatch.setattr("ldm.training.caches.canvases.hinted_condition", refused)
    again = open_run(path).part
    assert torch.equal(again.cond(again.images.describe(samples), samples).exemplars, found)


def test_hints_that_are_no_edges_leave_layouts_to_seeds(work: Path, exemplars: dict[str, str]) -> None:
    part = open_run(write(config("mine", SIZE, **exemplars, hints={"kind": "tile"}), work / "m.yaml")).part
    samples = part.images.plain(2, seed=0)
    found = part.cond(["a cat", "a cat"], samples, [3, 4]).exemplars
    wanted = loaded(exemplars).text(["a cat", "a cat"], (SIZE // CELL,) * 2, seeds=[3, 4]).exemplars
    assert torch.equal(found, wanted)


def test_a_file_of_another_hint_is_fitted_again(work: Path, exemplars: dict[str, str]) -> None:
    hints = {"kind": "files", "folder": "photos"}
    part = open_run(write(config("canny", SIZE, **exemplars, hints=hints), work / "c.yaml")).part
    (sample,) = part.images.plain(1, seed=0)
    before = part.hints.key(sample)
    path = part.hints._files.path(sample.item)
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(path)
    assert part.hints.key(sample) != before != ""
    assert open_run(work / "c.yaml").part.card.name == "canny"


def test_a_file_states_what_its_hints_are(work: Path, exemplars: dict[str, str]) -> None:
    folder = train_recipe(
        write(config("mine", SIZE, **exemplars, hints={"kind": "scribble"}), work / "mine.yaml"),
        progress=False,
    )
    assert loaded(exemplars).controls.load(folder / "mine.safetensors").card.name == "scribble"


def test_diffusers_draws_the_same_image_with_a_trained_control(work: Path, model: dict[str, str]) -> None:
    made = config("edges", **model, layout="diffusers")
    made["run"]["optimizer"]["lr"] = 0.05
    folder = train_recipe(write(made, work / "edges.yaml"), progress=False)
    pipe = loaded(model)
    theirs = diffusers_pipeline(copy.deepcopy(pipe), "StableDiffusionPipeline", work)
    own = diffusers.StableDiffusionControlNetPipeline(
        **{name: part for name, part in theirs.components.items() if name != "image_encoder"},
        controlnet=diffusers.ControlNetModel.from_pretrained(folder),
        requires_safety_checker=False,
    )
    own.set_progress_bar_config(disable=True)
    own.scheduler = diffusers.DDIMScheduler.from_config(own.scheduler.config)
    hint = canny(next((work / "photos").glob("*.png")))[..., :32, :32]
    wanted = own(
        "a cat",
        image=hint,
        latents=seeded_noise(pipe, 32),
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="pt",
        height=32,
        width=32,
    ).images
    pipe.controls.load(folder, name="edges", card="canny")
    noise = seeded_noise(pipe, 32)
    plain = drawn(pipe, 32, latents=noise)
    found = drawn(pipe, 32, latents=noise, controls=[ldm.Control("edges", hint)])
    assert (found - wanted).abs().max() <= STEP
    assert (found - plain).abs().max() > 4 * STEP


def test_the_original_layout_has_the_published_names(work: Path, model: dict[str, str]) -> None:
    file = train_recipe(write(config("edges", **model), work / "edges.yaml"), progress=False)
    names = set(read_safetensors(file / "edges.safetensors"))
    assert {"input_hint_block.0.weight", "zero_convs.0.0.weight", "middle_block_out.0.weight"} <= names


def test_the_loss_falls(work: Path, exemplars: dict[str, str]) -> None:
    made = config("one", SIZE, **exemplars, diffusion={"drop": 0.0})
    made["run"] |= {"steps": 40, "optimizer": {"lr": 0.01, "warmup": 1, "weight_decay": 0.0}, "ema": 0.5}
    made["run"] |= dict.fromkeys(("validate_every", "sample_every", "checkpoint_every"), 40)
    opened = open_run(write(made, work / "one.yaml"))
    before = loss_of(opened.part)
    opened.train(progress=False)
    assert loss_of(opened.part) < 0.9 * before


def test_an_interrupted_training_resumes_bit_identically(work: Path, exemplars: dict[str, str]) -> None:
    states = []
    for name, stops in (("whole", ()), ("parts", (1, 3))):
        made = config(name, SIZE, **exemplars)
        made["run"]["checkpoint_every"] = 1
        path = write(made, work / f"{name}.yaml")
        for stop in (*stops, None):
            open_run(path).train(until=stop, progress=False)
        states.append(torch.load(work / f"runs/{name}/checkpoint.pt", weights_only=True)["model"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_hints_are_read_from_files_in_the_frame_of_their_image(work: Path, model: dict[str, str]) -> None:
    """A hint that is the image itself equals the image in its frame."""
    hints = {"kind": "files", "folder": "photos"}
    data = {"kind": "folder", "path": "photos", "size": 32, "least": 8, "held_out": 0, "crop": "random"}
    part = open_run(write(config("edges", **model, hints=hints, data=data), work / "e.yaml")).part
    samples = part.samples.rows[:3]
    assert (part.hints(samples) - (part.images.tensor(samples) / 2 + 0.5)).abs().max() < 1e-6


def test_hints_are_read_as_those_of_a_call(work: Path, model: dict[str, str]) -> None:
    """16 bits, transparency, orientation and formats are those of `to_pixels`."""
    write_photos(work / "photos", 4, width=32, height=32)
    folder = work / "hints"
    folder.mkdir()
    ramp = np.arange(32 * 32).reshape(32, 32)
    Image.fromarray((ramp * 64).astype(np.uint16)).save(folder / "0000.png")
    layers = np.stack([ramp // 4, ramp % 256, ramp % 31, ramp % 200], -1).astype(np.uint8)
    Image.fromarray(layers).save(folder / "0001.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(layers[..., :3]).save(folder / "0002.png", exif=turned)
    Image.fromarray(layers[..., :3]).save(folder / "0003.png", "PPM")
    hints = {"kind": "files", "folder": "hints"}
    part = open_run(write(config("files", **model, hints=hints), work / "f.yaml")).part
    rows = {part.images.files.dataset.record(row.item).name: row for row in part.samples.rows}
    for name in ("0000.png", "0001.png", "0002.png"):
        assert (part.hints([rows[name]]) - to_pixels(folder / name)).abs().max() < 0.51 / 255, name
    with pytest.raises(ValueError, match=r"hint: '.*0003.png' is not a readable image"):
        part.hints([rows["0003.png"]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hints": {"kind": "files"}}, "expected a folder for 'files' alone"),
        ({"hints": {"kind": "files", "folder": "none"}}, "is absent"),
        ({"blocks": 1}, "blocks 1: expected none"),
        ({"blocks": 0}, "blocks: expected at least 1"),
        ({"run": run("bad", distributed="fsdp")}, "expected 'ddp'"),
        ({"diffusion": {"prediction": "v"}}, "an adapter cannot change it"),
    ],
)
def test_what_cannot_be_trained_is_named(
    work: Path, model: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_run(write(config("bad", **{**model, **changes}), work / "bad.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layout": "diffusers"}, "has a DiT, expected 'original'"), ({"blocks": 3}, "expected at most 2")],
)
def test_what_a_transformer_does_not_take_is_named(
    work: Path, exemplars: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_run(write(config("bad", SIZE, **exemplars, **changes), work / "bad.yaml"))


def test_a_control_of_another_kind_of_network_is_refused(
    work: Path, model: dict[str, str], exemplars: dict[str, str]
) -> None:
    for name, side, own, other in (("dit", SIZE, exemplars, model), ("unet", 32, model, exemplars)):
        file = train_recipe(write(config(name, side, **own), work / f"{name}.yaml"), progress=False)
        with pytest.raises(ValueError, match="the file controls a"):
            loaded(other).controls.load(file / f"{name}.safetensors")
        assert "ControlNet" in inspect(file / f"{name}.safetensors").kind
