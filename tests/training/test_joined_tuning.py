"""Fine-tuning of inpainting, depth and class-conditional models: conditions, loss, resumption, exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from photos import drawn_photo, write_photos
from PIL import Image
from reduced_families import register
from tiny_trainings import run, write

import ldm
from ldm.training.draws import Draws
from ldm.training.inputs.beside import WHOLE, draw_hole
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run

FOLDER = {"kind": "folder", "path": "photos", "size": 32, "held_out": 0.2}
CLASSES = {"kind": "classes", "path": "classes", "size": 32, "held_out": 0.2}
# family: its data and other keys, and a task of the trained model
CASES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "sd-v1-5-inpainting": (
        {"data": FOLDER},
        lambda pipe: pipe.inpaint("a disc", "photos/0000.png", hole(), steps=1, progress=False),
    ),
    "sd-v2-depth": (
        {"data": {**FOLDER, "depth": "maps"}},
        lambda pipe: pipe.depth_to_image("a disc", photo(), "maps/0000.png", steps=1, progress=False),
    ),
    "ldm-cin256-v2": (
        {"data": CLASSES, "train": ["unet", "class"]},
        lambda pipe: pipe.class_to_image(2, steps=1, progress=False),
    ),
}


def photo() -> Image.Image:
    return drawn_photo(0)[0].resize((32, 32))


def hole() -> Image.Image:
    mask = np.zeros((40, 48), dtype=np.uint8)
    mask[8:24, 8:30] = 255
    return Image.fromarray(mask)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write captioned images, their depth maps and folders of classes; change to the folder above them."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 12)
    (tmp_path / "maps").mkdir()
    for path in sorted((tmp_path / "photos").glob("*.png")):
        gray = np.asarray(Image.open(path).convert("L"), dtype=np.uint16)
        Image.fromarray(gray * 100 + 7).save(tmp_path / "maps" / path.name)  # 16 bits
    for i in range(12):
        image, caption = drawn_photo(i)
        folder = tmp_path / "classes" / caption.split()[1]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    return tmp_path


def tiny(family: str) -> dict[str, Any]:
    """Write the weights of a small model of a family, and return the keys that name it."""
    name = register(family, Path.cwd()).name
    ldm.save(ldm.load(name, weights="random", dtype="float32"), name)
    return {"base": name, "weights": name}


def config(name: str, family: str, steps: int = 4, **changes: Any) -> dict[str, Any]:
    options = {**tiny(family), **CASES[family][0], **changes}
    return {"part": "fine-tune", "run": run(name, steps=steps), **options}


def part_of(work: Path, family: str, **changes: Any) -> Any:
    return open_run(write(config("any", family, **changes), work / "any.yaml")).part


@pytest.mark.parametrize("family", CASES)
def test_it_trains_resumes_exactly_and_loads(family: str, work: Path) -> None:
    halves = write(config("halves", family), work / "halves.yaml")
    open_run(halves).train(until=2, progress=False)
    open_run(halves).train(progress=False)
    whole = write({**config("whole", family)}, work / "whole.yaml")
    folder = train_recipe(whole, progress=False)
    expected, found = (
        torch.load(work / f"runs/{name}/checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "halves")
    )
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    before, after = (
        ldm.load(f"tiny-{family}", weights=each, dtype="float32") for each in (f"tiny-{family}", folder)
    )
    for name, network in before.networks().items():
        state = after.networks()[name].state_dict()
        same = all(torch.allclose(state[k], v, rtol=1e-3, atol=1e-4) for k, v in network.state_dict().items())
        assert same == (name not in CASES[family][0].get("train", ["unet"]))
    assert CASES[family][1](after).tensor.isfinite().all()


def loss_by_hand(part: Any, draws: Draws, joined: Callable[[Any, Any], torch.Tensor]) -> torch.Tensor:
    """Return the loss of a batch, from the equations and the network alone."""
    chosen, rows = part.samples.draw(draws)
    x0 = part.latents.sample(rows, draws)
    context = part.pipe.text(part.images.captions(chosen, draws, drop=0.0))
    t = part.diffusion.draw(draws)
    eps = draws.normal(*x0.shape)
    signal = part.denoiser.schedule.alphas_cumprod[t][:, None, None, None].float()
    x = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
    raw = part.denoiser.net(torch.cat([x, joined(chosen, draws)], 1), t, context)
    return (raw - eps).square().mean()


def test_the_loss_of_an_inpainting_model_is_on_mask_and_masked_latent(work: Path) -> None:
    part = part_of(work, "sd-v1-5-inpainting", diffusion={"drop": 0.0})
    seed = part.run.seed

    def joined(chosen: Any, draws: Draws) -> torch.Tensor:
        found = []
        for sample, index in zip(chosen, draws.samples, strict=True):
            mask = torch.from_numpy(draw_hole(Draws(seed, range(0)).of_sample(index, 4), 32, 32))
            x = part.images.tensor([sample]) * (1 - mask)  # grey, 0 in [−1, 1], where it is unknown
            latent = part.pipe.vae.encode(x).mode() * part.pipe.latent_scale
            found.append(torch.cat([F.interpolate(mask[None, None], latent.shape[-2:]), latent], 1))
        return torch.cat(found)

    with torch.no_grad():
        got = part.loss(Draws(seed, range(8, 12)))[0]
        assert float(got) == pytest.approx(
            float(loss_by_hand(part, Draws(seed, range(8, 12)), joined)), rel=1e-5
        )


def test_depth_maps_are_framed_as_their_images(work: Path) -> None:
    data = {**FOLDER, "depth": "maps", "crop": "random", "mirror": 0.5}
    part = part_of(work, "sd-v2-depth", data=data)
    samples = part.images.draw(Draws(0, range(6)))
    assert any(sample.frame.mirrored for sample in samples)
    depth = part.cond([""] * 6, samples).concat  # (B, 1, 16, 16)
    gray = part.images.tensor(samples) / 2 + 0.5
    gray = (gray * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    gray = F.interpolate(gray, depth.shape[-2:], mode="bicubic", align_corners=False)
    low, high = gray.amin((1, 2, 3), keepdim=True), gray.amax((1, 2, 3), keepdim=True)
    assert (depth - (2 * (gray - low) / (high - low) - 1)).abs().max() < 0.05
    (work / "maps/0003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"data.depth: .*0003.png' is absent"):
        part_of(work, "sd-v2-depth")
    with pytest.raises(ValueError, match="data.depth: expected a folder"):
        part_of(work, "sd-v2-depth", data=FOLDER)


def test_classes_are_numbered_by_name_and_dropped_for_none(work: Path) -> None:
    part = part_of(work, "ldm-cin256-v2")
    assert part.classes.numbers == {"blue": 0, "green": 1, "red": 2, "yellow": 3, "": 1000}
    table = part.pipe.text.embedding.weight
    cond = part.cond(["red", ""], part.images.plain(2, seed=0))
    assert torch.equal(cond.context[:, 0], table[[2, 1000]])
    for old, new in (("blue", "12"), ("green", "7"), ("red", "900"), ("yellow", "3")):
        (work / "classes" / old).rename(work / "classes" / new)
    assert part_of(work, "ldm-cin256-v2").classes.numbers["900"] == 900
    (work / "classes" / "3").rename(work / "classes" / "1000")
    with pytest.raises(ValueError, match="has the classes 0 to 1000 but 1000, which stands for none"):
        part_of(work, "ldm-cin256-v2")
    with pytest.raises(ValueError, match="has 0 captions, expected one, the name of its class"):
        part_of(work, "ldm-cin256-v2", data={**FOLDER, "path": "classes"})


def test_the_export_states_the_number_of_each_class(work: Path) -> None:
    options = config("stated", "ldm-cin256-v2", steps=1)
    folder = train_recipe(write(options, work / "stated.yaml"), progress=False)
    about = yaml.safe_load((folder / "class.yaml").read_text(encoding="utf-8"))
    assert about["class_numbers"] == {"blue": 0, "green": 1, "red": 2, "yellow": 3}


def test_a_model_without_a_class_for_none_drops_no_captions(work: Path) -> None:
    base = tiny("ldm-cin256")
    options = {"part": "fine-tune", "run": run("any", steps=1), "data": CLASSES, **base}
    with pytest.raises(ValueError, match="drop 0.1: expected 0"):
        open_run(write(options, work / "bad.yaml"))
    open_run(write({**options, "diffusion": {"drop": 0.0}}, work / "good.yaml")).train(progress=False)


def test_holes_are_a_function_of_their_number_and_of_every_kind() -> None:
    holes = [draw_hole(np.random.default_rng(i), 48, 32) for i in range(400)]
    assert all(each.shape == (48, 32) and set(np.unique(each)) <= {0.0, 1.0} for each in holes)
    assert all(each.any() for each in holes)
    assert np.mean([each.all() for each in holes]) == pytest.approx(WHOLE, abs=0.07)
    shares = np.array([each.mean() for each in holes if not each.all()])
    assert shares.min() < 0.1 and 0.2 < shares.mean() < 0.6 and shares.max() < 1
    assert (holes[7] == draw_hole(np.random.default_rng(7), 48, 32)).all()


def test_a_lora_of_an_inpainting_model_is_trained_and_loads(work: Path) -> None:
    base = tiny("sd-v1-5-inpainting")
    options = {"part": "lora", "run": run("lora", steps=2), "data": FOLDER, **base}
    folder = train_recipe(write(options, work / "lora.yaml"), progress=False)
    pipe = ldm.load(base["base"], weights=base["weights"], dtype="float32")
    before = CASES["sd-v1-5-inpainting"][1](pipe).tensor
    pipe.adapters.load(next(folder.glob("*.safetensors")))
    assert not torch.equal(CASES["sd-v1-5-inpainting"][1](pipe).tensor, before)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "instruct-pix2pix",
            {},
            "reads the image before an edit, which a data set of captioned images lacks",
        ),
        ("sdxl-refiner", {}, "reads aesthetic scores"),
        ("sd-v1-5-inpainting", {"prior": {"prompt": "a dog"}}, "prior: .* draws no images of a prompt alone"),
        ("sd-v1-5-inpainting", {"part": "control-net"}, "reads inpaint itself"),
        ("ldm-cin256-v2", {"cached_texts": True}, "cached_texts: expected false"),
    ],
)
def test_what_is_lacking_is_named(family: str, changes: dict[str, Any], message: str, work: Path) -> None:
    options = {"part": "fine-tune", "run": run("bad", steps=1), "data": FOLDER, **tiny(family), **changes}
    with pytest.raises(ValueError, match=message):
        open_run(write(options, work / "bad.yaml"))
