"""Controls of pipelines: parity with diffusers, hints and their conventions, recipes, threads, refusals."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from control_nets import lines, peer_of, random_control_net, reduced_config, write_png
from diffusers_pipelines import (
    assert_equal,
    differ,
    diffusers_pipeline,
    diffusers_scheduler,
    gradient_image,
    random_pipeline,
    rectangle_mask,
)
from malicious_files import canary_ckpt
from torch import Tensor

import ldm
from ldm.images.files import read_recipe
from ldm.models.control.control_net import ControlNet
from ldm.pipelines.control.hints import HintConvention
from ldm.registry.replaying import replay
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import to_layout

# the peer's PNDM counts its first step twice in the fractions of the grid, so both sample by DDIM
CALL: dict[str, Any] = {"steps": 5, "seed": 3, "sampler": "ddim", "progress": False}
KINDS = {"sd": "StableDiffusionControlNetPipeline", "xl": "StableDiffusionXLControlNetPipeline"}
HINT = lines(32)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_pipeline("sd-v1-5", "reduced", tmp_path_factory.mktemp("sd"))[0]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_pipeline("sdxl-base", "reduced", tmp_path_factory.mktemp("xl"))[0]


@pytest.fixture
def pipe(sd: Any) -> Iterator[Any]:
    """Return a pipeline, from which all controls are removed afterwards."""
    yield sd
    for each in sd.controls.list():
        sd.controls.remove(each.name)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
def test_numbers_of_numpy_and_torch_are_those_of_python(convert: Any) -> None:
    made = ldm.Control(
        "edges",
        "hint.png",
        strength=convert(0.5),
        start=convert(0.25),
        end=convert(0.75),
        guess=convert(True),
    )
    assert made == ldm.Control("edges", "hint.png", strength=0.5, start=0.25, end=0.75, guess=True)
    assert [type(value) for value in (made.strength, made.start, made.end, made.guess)] == [float] * 3 + [
        bool
    ]
    assert ldm.Control("edges", "hint.png", margins=convert([1, 2, 3, 4])).margins == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margins": 5}, "margins: expected left, right, top and bottom, got 5"),
        ({"margins": None}, "margins: expected left, right, top and bottom, got None"),
        ({"strength": np.float32("nan")}, "strength: expected a finite number"),
        ({"end": "1"}, "end: expected a finite number"),
        ({"guess": np.int64(2)}, "guess: expected True or False"),
    ],
)
def test_options_that_are_no_such_values_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ldm.Control("edges", "hint.png", **options)


def network_for(pipe: Any, **changes: Any) -> ControlNet:
    """Return a ControlNet whose residuals are small, as those of trained ones are."""
    made = random_control_net(reduced_config(pipe.networks()["unet"].config, **changes))
    for zero in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        zero.weight.mul_(0.5)
    return made


def written(network: ControlNet, path: Path, layout: Any = "diffusers", prefix: str = "") -> Path:
    write_safetensors(path, {f"{prefix}{k}": v for k, v in to_layout(network, layout).items()})
    return path


def peer_images(pipe: Any, key: str, network: ControlNet, folder: Path, **options: Any) -> Tensor:
    kind = KINDS[key]
    base = "StableDiffusionPipeline" if key == "sd" else "StableDiffusionXLPipeline"
    theirs = diffusers_pipeline(pipe, base, folder)
    own = getattr(diffusers, kind)(
        **{name: part for name, part in theirs.components.items() if name != "image_encoder"},
        controlnet=peer_of(network),
        **({"requires_safety_checker": False} if key == "sd" else {}),
    )
    own.set_progress_bar_config(disable=True)
    own.scheduler = diffusers_scheduler(pipe, "ddim")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    scale = pipe.card.defaults.guidance
    out = own(
        "a cat",
        image=HINT,
        num_inference_steps=5,
        latents=noise,
        guidance_scale=scale,
        output_type="pt",
        height=32,
        width=32,
        **options,
    )
    return out.images


@pytest.mark.parametrize("key", KINDS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        (
            {"strength": 0.6, "start": 0.2, "end": 0.8},
            {
                "controlnet_conditioning_scale": 0.6,
                "control_guidance_start": 0.2,
                "control_guidance_end": 0.8,
            },
        ),
        ({"guess": True}, {"guess_mode": True}),
    ],
    ids=["plain", "interval", "guess"],
)
def test_parity_with_diffusers(
    key: str, ours: Any, theirs: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipe = request.getfixturevalue(key)
    network = network_for(pipe)
    pipe.controls.load(written(network, tmp_path / f"{key}-canny.safetensors"), name="edges")
    try:
        own = pipe.text_to_image("a cat", controls=[ldm.Control("edges", HINT, **ours)], **CALL).tensor
    finally:
        pipe.controls.remove("edges")
    assert_equal(own, peer_images(pipe, key, network, tmp_path, **theirs))
    assert differ(own, pipe.text_to_image("a cat", **CALL).tensor)


def test_global_pool_is_that_of_diffusers(pipe: Any, tmp_path: Path) -> None:
    """The file's name says that it is a shuffle model, whose residuals are averaged."""
    network = network_for(pipe, global_pool=True)
    loaded = pipe.controls.load(written(network, tmp_path / "control_v11e_sd15_shuffle.safetensors"))
    assert loaded.card.name == "shuffle"
    own = pipe.text_to_image("a cat", controls=[(loaded.name, HINT)], **CALL).tensor
    assert_equal(own, peer_images(pipe, "sd", network, tmp_path))


def test_layouts_prefixes_and_folders_are_the_same_network(pipe: Any, tmp_path: Path) -> None:
    network = network_for(pipe)
    peer_of(network).save_pretrained(tmp_path / "folder")
    paths = [
        written(network, tmp_path / "a.safetensors"),
        written(network, tmp_path / "b.safetensors", "original"),
        written(network, tmp_path / "c.safetensors", "original", "control_model."),
        tmp_path / "folder",
        tmp_path / "d.pth",
    ]
    whole = {f"control_model.{key}": value for key, value in to_layout(network, "original").items()}
    torch.save(
        {"state_dict": {**whole, "model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.ones(3)}},
        paths[-1],
    )
    states = [pipe.controls.load(path).network.state_dict() for path in paths]
    assert [each.name for each in pipe.controls.list()] == ["a", "b", "c", "folder", "d"]
    for state in states:
        assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert "ControlNet" in str(pipe.controls) and "parameters" in str(pipe.controls)


def test_several_controls_add_up(pipe: Any, tmp_path: Path) -> None:
    network = network_for(pipe)
    pipe.controls.load(written(network, tmp_path / "a.safetensors"))
    one = pipe.text_to_image("a cat", controls=[("a", HINT, 0.8)], **CALL).tensor
    halves = pipe.text_to_image("a cat", controls=[("a", HINT, 0.5), ("a", HINT, 0.3)], **CALL).tensor
    assert torch.allclose(one, halves, atol=1e-3)
    none = pipe.text_to_image("a cat", controls=[("a", HINT, 0.0)], **CALL).tensor
    assert torch.equal(none, pipe.text_to_image("a cat", **CALL).tensor)


def test_tasks_with_images_are_controlled(pipe: Any, tmp_path: Path) -> None:
    pipe.controls.load(written(network_for(pipe), tmp_path / "a.safetensors"))
    image, mask = gradient_image(32), rectangle_mask(32)
    for run in (
        lambda **o: pipe.image_to_image("a cat", image, **CALL, **o),
        lambda **o: pipe.inpaint("a cat", image, mask, **CALL, **o),
        lambda **o: pipe.inpaint("a cat", image, mask, window=16, **CALL, **o),
    ):
        assert differ(run(controls=[("a", HINT)]).tensor, run().tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        padded = pipe.image_to_image("a cat", image[..., :31, :], controls=[("a", HINT[..., :31, :])], **CALL)
    assert padded.tensor.shape[-2:] == (31, 32)


def test_an_optimized_pipeline_makes_the_same_image(pipe: Any, tmp_path: Path) -> None:
    path = written(network_for(pipe), tmp_path / "a.safetensors")
    fast = copy.deepcopy(pipe)
    pipe.controls.load(path)
    plain = pipe.text_to_image("a cat", controls=[("a", HINT)], **CALL).tensor
    ldm.optimize(fast)
    loaded = fast.controls.load(path)  # its layers become those of the UNet
    assert type(loaded.network.conv_in) is type(fast.networks()["unet"].conv_in)
    assert (fast.text_to_image("a cat", controls=[("a", HINT)], **CALL).tensor - plain).abs().max() < 1e-3
    ldm.optimize(fast, reuse=2, branch=1)
    reused = fast.text_to_image("a cat", controls=[("a", HINT)], **CALL).tensor
    without = fast.text_to_image("a cat", **CALL).tensor
    assert (reused - plain).abs().mean() < (without - plain).abs().mean()


def test_threads_have_controls_of_their_own(pipe: Any, tmp_path: Path) -> None:
    pipe.controls.load(written(network_for(pipe), tmp_path / "a.safetensors"))
    hints: list[Any] = [[("a", HINT)], None, [("a", lines(32, 7))], [("a", HINT, 0.4)]]
    alone = [pipe.text_to_image("a cat", controls=each, **CALL).tensor for each in hints]
    found: dict[int, Tensor] = {}

    def run(i: int) -> None:
        found[i] = pipe.text_to_image("a cat", controls=hints[i], **CALL).tensor

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(hints))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(len(hints)))


def test_recipes_name_files_and_hints(pipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "controls"
    folder.mkdir()
    path = written(network_for(pipe), folder / "net-canny.safetensors")
    pipe.controls.load(path, name="edges")
    hint, image = write_png(tmp_path / "hint.png", HINT), write_png(tmp_path / "in.png", gradient_image(32))
    use = [ldm.Control("edges", hint, strength=0.7, end=0.8)]
    path.rename(folder / "renamed.safetensors")
    for images in (
        pipe.text_to_image("a cat", controls=use, **CALL),
        pipe.image_to_image("a cat", image, controls=use, **CALL),
    ):
        images.save(tmp_path / "cat.png")
        recipe = read_recipe(tmp_path / "cat.png")
        assert recipe["replayable"] and recipe["control_networks"][0]["card"] == "canny"
        again = replay(recipe, weights="random", controls=folder)
        assert torch.equal(again.tensor, images.tensor)
    with pytest.raises(FileNotFoundError, match="made with the control 'edges'"):
        replay(recipe, weights="random", controls=tmp_path / "cat.png")
    write_png(hint, lines(32, 9))
    with pytest.raises(ValueError, match="hint: .* is not the file"):
        replay(recipe, weights="random", controls=folder)
    memory = pipe.text_to_image("a cat", controls=[("edges", HINT)], **CALL).recipe
    assert not memory["replayable"] and "hints" in memory["because"] and memory["inputs"]


def test_hints_that_look_inverted_are_named(pipe: Any, tmp_path: Path) -> None:
    pipe.controls.load(written(network_for(pipe), tmp_path / "x_canny.safetensors"), name="canny")
    pipe.controls.load(tmp_path / "x_canny.safetensors", name="normal", card="normal")
    with pytest.warns(HintConvention, match="looks inverted.*white on black"):
        pipe.text_to_image("a cat", controls=[("canny", 1 - HINT)], **CALL)
    blue = torch.tensor([0.5, 0.5, 1.0])[:, None, None].expand(3, 32, 32)
    with pytest.warns(HintConvention, match="red and blue were exchanged"):
        pipe.text_to_image("a cat", controls=[("normal", blue.flip(0))], **CALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.text_to_image("a cat", controls=[("canny", HINT), ("normal", blue)], **CALL)


def test_masked_hints_are_minus_one_in_the_hole(pipe: Any, tmp_path: Path) -> None:
    pipe.controls.load(written(network_for(pipe), tmp_path / "v11p_inpaint.safetensors"), name="fill")
    image, mask = gradient_image(32), rectangle_mask(32)
    call = pipe.settle("a cat", controls=[ldm.Control("fill", image, mask=mask)], **CALL)
    expected = image * (1 - mask) - mask
    assert torch.allclose(call.controls[0].hint, expected)
    with pytest.raises(ValueError, match="expected a mask"):
        pipe.text_to_image("a cat", controls=[("fill", image)], **CALL)


def test_refused_options_and_hints(pipe: Any, tmp_path: Path) -> None:
    pipe.controls.load(written(network_for(pipe), tmp_path / "a.safetensors"))
    cases: list[tuple[Any, str]] = [
        ([("b", HINT)], "no control is called 'b'"),
        ("a", "expected a list of ldm.Control"),
        ([("a",)], "expected an ldm.Control"),
        ([{"name": "a", "hint": HINT, "power": 2}], "expected the entries name and hint"),
        ([("a", HINT, 1.0, 0.5, 0.2)], "start 0.5, expected less than end 0.2"),
        ([("a", HINT, float("nan"))], "strength: expected a finite number"),
        ([("a", HINT[..., :16])], "expected the aspect ratio"),
        ([("a", torch.cat([HINT, HINT]))], "2 hints for 1 images"),
        ([("a", HINT * 3)], r"expected \[0, 1\]"),
        ([ldm.Control("a", HINT, mask=HINT)], "expected no mask"),
    ]
    for controls, message in cases:
        with pytest.raises(ValueError, match=message):
            pipe.text_to_image("a cat", controls=controls, **CALL)
    with pytest.raises(FileNotFoundError, match="hint: .*no such file"):
        pipe.text_to_image("a cat", controls=[("a", "absent.png")], **CALL)


def test_refused_files_leave_the_pipeline_as_it_was(pipe: Any, xl: Any, tmp_path: Path) -> None:
    network = network_for(pipe)
    before = pipe.text_to_image("a cat", **CALL).tensor
    state = to_layout(network, "original")
    short = {key: value for key, value in state.items() if not key.startswith("zero_convs.2")}
    broken = {**state, "zero_convs.0.0.weight": torch.full_like(state["zero_convs.0.0.weight"], torch.nan)}
    files = {
        "short": (short, "missing"),
        "extra": ({**state, "other": torch.zeros(1)}, "unexpected"),
        "nan": (broken, "NaN or infinity"),
        "none": ({"conv.weight": torch.zeros(2, 2)}, "is no ControlNet"),
        "xl": (to_layout(network_for(xl), "original"), "was made for a model with a context of 80"),
    }
    for name, (tensors, message) in files.items():
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(ValueError, match=message):
            pipe.controls.load(tmp_path / f"{name}.safetensors")
    hostile = canary_ckpt(tmp_path / "evil.pth", tmp_path / "executed")
    with pytest.raises(ValueError, match="refused"):
        pipe.controls.load(hostile)
    assert not (tmp_path / "executed").exists()
    good = written(network, tmp_path / "good.safetensors")
    pipe.controls.load(good)
    with pytest.raises(ValueError, match="'good' is loaded"):
        pipe.controls.load(good)
    with pytest.raises(ValueError, match="card 'cany'"):
        pipe.controls.load(good, name="two", card="cany")
    pipe.controls.remove("good")
    assert len(pipe.controls) == 0 and len(pipe.controls.networks) == 0
    assert torch.equal(pipe.text_to_image("a cat", **CALL).tensor, before)
