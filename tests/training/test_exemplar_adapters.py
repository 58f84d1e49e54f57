"""Training of a loaded model with exemplars: an image is shown its things where it shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import same_bits, weights_of
from photos import write_photos
from tiny_exemplars import SIZE, tiny_exemplar_model
from tiny_trainings import interrupted, run, write
from torch import Tensor

import ldm
from ldm.pipelines.layouts import LayoutFit, fitted_condition
from ldm.registry.adapting import extract_adapter
from ldm.training.draws import Draws
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run
from ldm.weights.adapters.places import Places
from ldm.weights.formats.safetensors import read_safetensors

CAPTIONS = ("a cat on a blue background", "a dog", "three apple", "a cat and a dog")
BAR = 1e-5  # of the RMS


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a model and captioned images, and change to the folder above them."""
    monkeypatch.chdir(tmp_path)
    ldm.save(tiny_exemplar_model(), tmp_path / "model", dtype="float32")
    write_photos(tmp_path / "photos", 4, width=SIZE, height=SIZE)
    for i, path in enumerate(sorted((tmp_path / "photos").glob("*.txt"))):
        path.write_text(CAPTIONS[i % len(CAPTIONS)], encoding="utf-8")
    return tmp_path


def config(name: str, part: str = "lora", **changes: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": "photos", "size": SIZE, "least": 8, "held_out": 0}
    kind = {"adapter": {"rank": 4}, "dtype": "float32"} if part == "lora" else {}
    made = {"part": part, "weights": "model", "run": run(name, steps=4), "data": data, **kind, **changes}
    made["run"]["optimizer"]["lr"] = 0.02
    return made


def loaded() -> Any:
    return ldm.load(weights="model", device="cpu", dtype="float32")


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@torch.no_grad()
def prediction(pipe: Any) -> Tensor:
    x = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    return pipe.denoiser.predict(x, torch.tensor([400.0]), pipe.text(["a cat"]))


def test_the_layers_of_a_transformer_are_those_of_its_blocks_and_its_head() -> None:
    net = tiny_exemplar_model().denoiser.net
    found = [place.path for place in Places("unet", net).layers(convolutions=False)]
    in_block = [f"{a}.{x}" for a in ("attn1", "attn2") for x in ("to_q", "to_k", "to_v", "to_out.0")]
    in_block += ["mlp.c_fc", "mlp.c_proj"]
    head = [f"proj_out.{x}" for x in ("modulation", "gates", "embed_in", "fc", "proj_out")]
    wanted = [f"blocks.{i}.{x}" for i in range(2) for x in in_block] + head + ["exemplars.embed"]
    assert sorted(found) == sorted(wanted)


def test_an_image_is_shown_its_things_in_the_layout_that_fits_it(work: Path) -> None:
    part = open_run(write(config("style"), work / "style.yaml")).part
    samples = part.images.plain(4, seed=0)
    texts = part.images.describe(samples)
    cond = part.cond(texts, samples)
    pipe = loaded()
    fit = LayoutFit(text=pipe.text, denoiser=pipe.denoiser)
    for i, text in enumerate(texts):
        known = pipe.encode(part.images.tensor(samples[i : i + 1]) / 2 + 0.5)
        wanted = fitted_condition(fit, text, 0, known, torch.zeros_like(known[:, :1]))
        assert wanted.exemplars is not None and cond.exemplars is not None
        assert (cond.exemplars[i] - wanted.exemplars[0]).abs().max() < 1e-3  # float16
        assert bool(cond.exemplars[i].any())
        length = wanted.context.shape[1]
        assert torch.equal(cond.context[i, :length], wanted.context[0])
    dropped = part.cond(["", texts[1]], samples[:2])
    assert not bool(dropped.exemplars[0].any()) and bool(dropped.exemplars[1].any())


def test_canvases_are_kept_on_the_disk(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(config("style"), work / "style.yaml")
    first = open_run(path).part
    samples = first.images.plain(4, seed=0)
    before = first.cond(first.images.describe(samples), samples).exemplars

    def refused(*_: object) -> None:
        raise AssertionError("it was fitted before")

    monkeypatch.setattr("ldm.training.caches.canvases.fitted_condition", refused)
    second = open_run(path).part
    assert torch.equal(second.cond(second.images.describe(samples), samples).exemplars, before)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_what_is_loaded_is_what_was_trained(work: Path, kind: str) -> None:
    made = config("style", train=["unet", "text"], adapter={"kind": kind, "rank": 2, "factor": 4})
    path = write(made, work / "style.yaml")
    file = train_recipe(path, progress=False) / "style.safetensors"
    part = open_run(path).part
    state = torch.load(work / "runs/style/checkpoint.pt", weights_only=True)["ema"]
    with torch.no_grad():
        for name, parameter in part.model.named_parameters():
            parameter.copy_(state[name])
    wanted, pipe = prediction(part.pipe), loaded()
    plain, before = prediction(pipe), weights_of(pipe)
    adapter = pipe.adapters.load(file).adapter
    assert set(adapter.modules) == {"unet", "text"} and adapter.modules["unet"] == 26
    assert rms(prediction(pipe) - wanted) < BAR * rms(wanted)
    assert rms(plain - wanted) > 1e-3 * rms(wanted)
    pipe.adapters.remove("style")
    assert same_bits(pipe, before)
    pipe.adapters.load(file, merge=False)
    assert rms(prediction(pipe) - wanted) < BAR * rms(wanted)
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in read_safetensors(file))


def test_an_interrupted_training_resumes_bit_identically(work: Path) -> None:
    whole, parts = interrupted(config, work)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize("part", ["lora", "fine-tune"])
def test_class_images_are_shown_what_they_were_drawn_of(
    work: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = {"prompt": "a cat", "images": 3, "weight": 0.5, "steps": 2, "guidance": 1.0}
    opened = open_run(write(config("mine", part, prior=prior), work / "mine.yaml")).part
    seen: list[Any] = []
    drawn = "ldm.training.tuning.tuned_model.draw_diffusion_loss"
    monkeypatch.setattr(drawn, lambda *args: seen.append(args) or _Nothing())
    draws = Draws(0, range(4))
    opened.prior_loss(opened.preserved, draws)
    _, _, x0, cond, used = seen[0]
    rows = [int(row) for row in opened.preserved.draws(Draws(0, range(4))).integers(3)]
    wanted = loaded().text(["a cat"] * 4, (4, 4), seeds=rows)
    assert torch.equal(cond.exemplars, wanted.exemplars)
    assert torch.equal(x0, opened.preserved.pairs.latent(rows)) and len(used) == 4


class _Nothing:
    weighted = torch.zeros(())


def test_a_fine_tuned_model_keeps_its_library_and_extracts_to_a_lora(work: Path) -> None:
    path = write(config("tuned", "fine-tune"), work / "tuned.yaml")
    folder = train_recipe(path, progress=False)
    tuned = ldm.load(weights=folder, device="cpu", dtype="float32")
    assert tuned.exemplars.names == loaded().exemplars.names
    file, left = extract_adapter(
        "model", folder, work / "tuned-lora.safetensors", rank=256, dtype=torch.float32
    )
    pipe = loaded()
    plain, wanted = prediction(pipe), prediction(tuned)
    pipe.adapters.load(file)
    assert any("embed_in" in name for name in left)
    for place in Places("unet", tuned.denoiser.net).layers(convolutions=False):
        site = place.sites["weight"]
        ours, theirs = (site.read(dict(p.denoiser.net.state_dict())) for p in (pipe, tuned))
        assert rms(ours - theirs) < BAR * rms(theirs)
    assert rms(prediction(pipe) - wanted) < 0.5 * rms(plain - wanted)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("textual-inversion", {"token": "zor"}, r"draws things from exemplars.*pipe\.exemplars\.add"),
        ("fine-tune", {"cached_texts": True}, "cached_texts: expected false"),
        ("lora", {"data": {"kind": "emoji", "folder": "none"}}, "."),
    ],
)
def test_what_cannot_be_trained_is_named(
    work: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_run(write(config("bad", part, **changes), work / "bad.yaml"))


def test_captions_that_name_nothing_of_the_library_are_refused(work: Path) -> None:
    for path in (work / "photos").glob("*.txt"):
        path.write_text("a zebra", encoding="utf-8")
    with pytest.raises(ValueError, match="no caption names a thing of the model's library.*zebra"):
        open_run(write(config("bad"), work / "bad.yaml"))


def test_words_that_are_not_read_are_named(work: Path) -> None:
    (work / "photos/0000.txt").write_text("a majestic cat", encoding="utf-8")
    with pytest.warns(UserWarning, match="words that the model does not read: majestic"):
        open_run(write(config("style"), work / "style.yaml"))
