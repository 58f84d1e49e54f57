"""Training of adapters: what a file does when it is loaded is what was trained, here and in diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import same_bits, weights_of
from diffusers_pipelines import STEP, diffusers_pipeline, seeded_noise
from photos import write_photos
from reduced_families import register
from tiny_trainings import run, write
from torch import Tensor

import ldm
from ldm.training.adapters.trained_adapter import AdapterShape, TrainedAdapter
from ldm.training.draws import Draws
from ldm.training.kinds import part_kinds
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run, read_training_config
from ldm.weights.adapters.files import read_adapter
from ldm.weights.formats.safetensors import read_safetensors

SHAPES: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 4, "alpha": 2.0},
    "rank-stabilised, with convolutions": {"rank": 4, "rank_stabilized": True, "convolutions": True},
    "DoRA": {"kind": "dora", "rank": 2, "convolutions": True},
    "LoKr": {"kind": "lokr", "rank": 2, "factor": 4, "convolutions": True},
    "LoKr of full matrices": {"kind": "lokr", "rank": 64},
}
TOKEN = "<zor>"
BAR = 1e-5  # of the RMS


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write 12 captioned images, and change to the folder above them."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 12)
    return tmp_path


def small(family: str, folder: Path) -> dict[str, str]:
    """Write a single file of a small model of a family; return it as `base` and `weights`."""
    name = register(family, folder).name
    path = folder / f"{name}.safetensors"
    ldm.save(ldm.load(name, weights="random", dtype="float32"), path, layout="original")
    return {"base": name, "weights": str(path)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return small("sd-v1-5", tmp_path_factory.mktemp("sd"))


def config(name: str, part: str = "lora", **changes: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": "photos", "size": 32, "held_out": 0.2}
    made = {"part": part, "run": run(name, steps=4), "data": data, "dtype": "float32", **changes}
    if part != "lora":
        del made["dtype"]
        made["data"] = {**data, "path": "bare", "captions": [f"a photo of {TOKEN}"]}
        write_photos(Path("bare"), 6)
        for caption in Path("bare").glob("*.txt"):
            caption.unlink()
    return made


def trained(made: dict[str, Any]) -> Path:
    """Train a configuration, and return the exported file."""
    name = made["run"]["name"]
    folder = train_recipe(write(made, Path(f"{name}.yaml")), progress=False)
    return folder / f"{name}.safetensors"


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@torch.no_grad()
def prediction(pipe: Any, prompt: str = "a red disc") -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe.denoiser.predict(x, torch.tensor([400.0]), pipe.text([prompt]))


def of_base(model: dict[str, str]) -> Any:
    return ldm.load(model["base"], weights=model["weights"], device="cpu", dtype="float32")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_adapter_changes_nothing_and_has_a_gradient(
    work: Path, model: dict[str, str], shape: str
) -> None:
    pipe = of_base(model).requires_grad_(False)
    before = prediction(pipe)
    networks = {part: pipe.networks()[part] for part in ("unet", "text")}
    adapter = TrainedAdapter(networks, AdapterShape(**SHAPES[shape]), seed=0)
    assert rms(prediction(pipe) - before) < BAR * rms(before)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.denoiser.predict(x, torch.tensor([400.0]), pipe.text(["a red disc"])).square().mean().backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters()}
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients.values())
    for part in networks:  # of each module one factor is zero at first, so that the other has no gradient
        assert any(name.startswith(part) and bool(grad.any()) for name, grad in gradients.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_loaded_is_what_was_trained(work: Path, model: dict[str, str], shape: str) -> None:
    made = config("style", **model, adapter=SHAPES[shape], train=["unet", "text"])
    made["run"]["optimizer"]["lr"] = 0.02
    file = trained(made)
    part = open_run(work / "style.yaml").part
    state = torch.load(work / "runs/style/checkpoint.pt", weights_only=True)["ema"]
    with torch.no_grad():
        for name, parameter in part.model.named_parameters():
            parameter.copy_(state[name])
    wanted = prediction(part.pipe)
    pipe = of_base(model)
    plain, before = prediction(pipe), weights_of(pipe)
    loaded = pipe.adapters.load(file)
    assert set(loaded.adapter.modules) == {"unet", "text"}
    assert rms(prediction(pipe) - wanted) < BAR * rms(wanted)
    assert rms(plain - wanted) > 1e-3 * rms(wanted)
    pipe.adapters.remove("style")
    assert same_bits(pipe, before)


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_diffusers_draws_the_same_image_with_a_trained_lora(
    work: Path, model: dict[str, str], names: str
) -> None:
    made = config("style", **model, train=["unet", "text"], names=names)
    made["adapter"] = {"rank": 4, "rank_stabilized": True, "convolutions": True}
    made["run"]["optimizer"]["lr"] = 0.02
    file = trained(made)
    pipe = of_base(model)
    theirs = diffusers_pipeline(copy.deepcopy(pipe), "StableDiffusionPipeline", work)
    theirs.set_progress_bar_config(disable=True)
    plain = drawn_by(theirs, pipe, "a red disc")
    theirs.load_lora_weights(str(file))
    pipe.adapters.load(file)
    wanted = drawn_by(theirs, pipe, "a red disc")
    assert (drawn(pipe, "a red disc") - wanted).abs().max() <= STEP
    assert (plain - wanted).abs().max() > 4 * STEP


def drawn(pipe: Any, prompt: str) -> Tensor:
    options = {"steps": 3, "guidance": 3.0, "sampler": "ddim", "progress": False}
    return pipe.text_to_image(prompt, latents=seeded_noise(pipe, 32), **options).tensor


def drawn_by(theirs: Any, pipe: Any, prompt: str) -> Tensor:
    """Return the image that diffusers draws, (1, 3, H, W) in [0, 1]."""
    import diffusers

    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    options = {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "pt",
        "height": 32,
        "width": 32,
    }
    return theirs(prompt, latents=seeded_noise(pipe, 32), **options).images


def test_diffusers_draws_the_same_image_with_a_trained_word(work: Path, model: dict[str, str]) -> None:
    made = config("zor", "textual-inversion", **model, token=TOKEN, vectors=3, start="a cat")
    made["run"]["optimizer"]["lr"] = 0.05
    file = trained(made)
    assert list(read_safetensors(file)) == [TOKEN]
    pipe = of_base(model)
    before = weights_of(pipe)
    theirs = diffusers_pipeline(copy.deepcopy(pipe), "StableDiffusionPipeline", work)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_textual_inversion(str(file))
    prompt = f"a photo of {TOKEN} on a table"
    plain = drawn(pipe, prompt)
    loaded = pipe.adapters.load(file)
    assert TOKEN in loaded.words and loaded.adapter.learned[0].count == 3 and same_bits(pipe, before)
    assert (drawn(pipe, prompt) - drawn_by(theirs, pipe, prompt)).abs().max() <= STEP
    assert (drawn(pipe, prompt) - plain).abs().max() > 4 * STEP


def test_only_the_vectors_of_a_word_are_trained(work: Path, model: dict[str, str]) -> None:
    path = write(
        config("zor", "textual-inversion", **model, token=TOKEN, vectors=2, start="cat"), work / "z.yaml"
    )
    opened = open_run(path)
    before, first = weights_of(opened.part.pipe), opened.part.model["text"].detach().clone()
    ids = opened.part.pipe.text.tokenizer.encode("cat")
    assert torch.equal(first, opened.part.pipe.text.tower.token_embedding.weight[ids * 2])
    opened.train(progress=False)
    assert same_bits(opened.part.pipe, before) and not torch.equal(first, opened.part.model["text"])


def test_sdxl_learns_a_word_in_both_towers(work: Path) -> None:
    file = trained(config("zor", "textual-inversion", **small("sdxl-base", work), token=TOKEN, vectors=2))
    assert {key: tuple(x.shape) for key, x in read_safetensors(file).items()} == {
        "clip_l": (2, 32),
        "clip_g": (2, 48),
    }


@pytest.mark.parametrize("part", ["lora", "textual-inversion"])
def test_an_interrupted_training_resumes_bit_identically(
    work: Path, model: dict[str, str], part: str
) -> None:
    states = []
    for name, stops in (("whole", ()), ("parts", (1, 3))):
        options = {"adapter": {"kind": "dora", "rank": 2}} if part == "lora" else {"token": TOKEN}
        made = config(name, part, **model, **options)
        made["run"]["checkpoint_every"] = 1
        path = write(made, work / f"{name}.yaml")
        for stop in (*stops, None):
            open_run(path).train(until=stop, progress=False)
        states.append(torch.load(work / f"runs/{name}/checkpoint.pt", weights_only=True))
    for key in ("model", "ema"):
        assert states[0][key].keys() == states[1][key].keys()
        assert all(torch.equal(value, states[1][key][name]) for name, value in states[0][key].items())


@pytest.mark.parametrize("part", ["lora", "fine-tune"])
def test_dreambooth_preserves_its_class(work: Path, model: dict[str, str], part: str) -> None:
    """Class images are those that the model draws before its training, and have a loss of their own."""
    prior = {"prompt": "a box", "images": 3, "weight": 0.5, "steps": 2, "guidance": 1.0}
    made = config("mine", part="lora", **model)
    made |= {"part": part, "prior": prior}
    if part == "fine-tune":
        del made["dtype"]
    path = write(made, work / "mine.yaml")
    opened = open_run(path).part
    base = of_base(model)
    images = base.text_to_image(
        "a box", n=3, seed=0, steps=2, guidance=1.0, height=32, width=32, progress=False
    )
    latents = torch.from_numpy(opened.preserved.pairs.latents).float()
    with torch.no_grad():
        decoded = opened.latents.decode(latents)
    assert (decoded / 2 + 0.5 - images.tensor).abs().clamp(0, 1).median() < 1e-2
    draws = Draws(0, range(4))
    loss, figures = opened.loss(draws)
    opened.preserved = None
    alone, _ = opened.loss(Draws(0, range(4)))
    assert float(loss) == pytest.approx(float(alone) + 0.5 * float(figures["prior"]), rel=1e-6)
    assert float(figures["prior"]) > 0
    train_recipe(path, progress=False)
    text = (work / "runs/mine/metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert any("prior" in row for row in rows)


@pytest.mark.parametrize("part", ["lora", "textual-inversion"])
def test_the_loss_falls(work: Path, model: dict[str, str], part: str) -> None:
    """One image, learned by heart: the loss at fixed noise falls well below that of the model itself."""
    options: dict[str, Any] = {"adapter": {"rank": 8}} if part == "lora" else {"token": TOKEN, "vectors": 4}
    made = config("one", part, **model, **options)
    made["run"] |= {"steps": 40, "optimizer": {"lr": 0.01, "warmup": 1, "weight_decay": 0.0}, "ema": 0.5}
    made["diffusion"] = {"drop": 0.0}
    made["run"] |= dict.fromkeys(("validate_every", "sample_every", "checkpoint_every"), 40)
    opened = open_run(write(made, work / "one.yaml"))
    before = opened.part.validate()["loss"]
    opened.train(progress=False)
    assert opened.part.validate()["loss"] < (0.9 if part == "lora" else 0.999) * before


def test_the_record_names_the_file_and_its_facts(work: Path, model: dict[str, str]) -> None:
    file = trained(config("style", **model, adapter={"rank": 2, "alpha": 1.0}))
    about = ldm.support.config.read_yaml(file.with_suffix(".yaml"))
    assert about["training"]["config"]["adapter"]["rank"] == 2 and about["figures"]["loss"] > 0
    facts = read_adapter(file).metadata
    assert facts["ss_network_dim"] == "2" and facts["ss_network_alpha"] == "1" and facts["ss_steps"] == "4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"rank": 0}}, "rank"),
        ({"adapter": {"kind": "lora", "alpha": -1.0}}, "alpha: expected at least 0"),
        ({"train": ["text2"]}, "has no 'text2'"),
        ({"diffusion": {"prediction": "v"}}, "an adapter cannot change it"),
        ({"names": "diffusers", "adapter": {"kind": "lokr"}}, "no names for LoKr"),
        ({"prior": {"prompt": "a box", "images": 0}}, "images: expected at least 1"),
        ({"run": run("bad", distributed="fsdp")}, "expected 'ddp'"),
        ({"part": "textual-inversion", "token": " "}, "expected a word"),
        ({"part": "textual-inversion", "token": TOKEN}, "expected the token '<zor>' in every caption, got"),
        ({"part": "textual-inversion", "token": TOKEN, "vectors": 0}, "vectors"),
    ],
)
def test_what_cannot_be_trained_is_named(
    work: Path, model: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    made = {**config("bad", **model), **changes}
    if made["part"] != "lora":
        del made["dtype"]
    with pytest.raises(ValueError, match=message):
        open_run(write(made, work / "bad.yaml"))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs/examples").glob("*.yaml")))
def test_the_examples_are_configurations(path: Path) -> None:
    name, made = read_training_config(path)
    names = {"textual-inversion": "thing", "control-net": "canny"}
    assert name in part_kinds() and made.run.name == names.get(path.stem, path.stem)
