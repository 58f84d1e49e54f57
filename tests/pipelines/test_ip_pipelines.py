"""IP-Adapters of pipelines: images equal diffusers', the tower is needed, recipes name it, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from clip_towers import write_tower
from control_nets import write_png
from diffusers_pipelines import (
    assert_equal,
    differ,
    diffusers_pipeline,
    diffusers_scheduler,
    gradient_image,
    random_pipeline,
)

import ldm
from ldm.models.control.ip_adapter import IPAdapter, IPAdapterConfig
from ldm.registry.replaying import replay
from ldm.weights.controls.ip_adapter import attention_widths, attentions_of, load_vision
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import build_network, randomise

CALL: dict[str, Any] = {"steps": 5, "seed": 3, "sampler": "ddim", "progress": False}
IMAGE = gradient_image(28)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_pipeline("sd-v1-5", "reduced", tmp_path_factory.mktemp("sd"))[0]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("tower"))


def adapter_for(pipe: Any, kind: Any) -> IPAdapter:
    unet = pipe.networks()["unet"]
    widths = attention_widths(attentions_of(unet))[1]
    config = IPAdapterConfig(
        kind=kind,
        image_dim=24 if kind == "base" else 32,
        context_dim=unet.config.context_dim,
        tokens=4,
        widths=widths,
        resampler=(32, 4, 2),
    )
    made: Any = randomise(build_network(config), 2)
    return made


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_images_equal_those_of_diffusers(pipe: Any, tower: Path, kind: str, tmp_path: Path) -> None:
    adapter = adapter_for(pipe, kind)
    state: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        part, _, name = key.partition(".")
        state[part][name] = value.clone()
    torch.save(state, tmp_path / "ip-adapter.bin")
    write_safetensors(tmp_path / "ip.safetensors", adapter.state_dict())
    loaded = pipe.controls.load(tmp_path / "ip-adapter.bin", name="a", vision=tower)
    same = pipe.controls.load(tmp_path / "ip.safetensors", name="b", vision=tower)
    try:
        assert loaded.what.startswith("IP-Adapter") and same.vision[0] is loaded.vision[0]
        own = pipe.text_to_image("a cat", controls=[("a", IMAGE, 0.7)], **CALL).tensor
        other = pipe.text_to_image("a cat", controls=[("b", IMAGE, 0.7)], **CALL).tensor
    finally:
        pipe.controls.remove("a")
        pipe.controls.remove("b")
    plain = pipe.text_to_image("a cat", **CALL).tensor
    assert torch.equal(own, other) and differ(own, plain)
    theirs = diffusers_pipeline(pipe, "StableDiffusionPipeline", tmp_path)
    theirs.register_modules(
        image_encoder=transformers.CLIPVisionModelWithProjection.from_pretrained(tower).eval()
    )
    theirs.scheduler = diffusers_scheduler(pipe, "ddim")
    theirs.load_ip_adapter(
        state, subfolder=None, weight_name=None, image_encoder_folder=None, low_cpu_mem_usage=False
    )
    theirs.set_ip_adapter_scale(0.7)
    wanted = theirs(
        "a cat",
        ip_adapter_image=load_vision(tower, torch.float32).prepare(IMAGE),
        num_inference_steps=5,
        latents=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)),
        guidance_scale=pipe.card.defaults.guidance,
        output_type="pt",
        height=32,
        width=32,
    ).images
    assert_equal(own, wanted)


def test_recipes_name_the_tower_and_optimized_pipelines_agree(pipe: Any, tower: Path, tmp_path: Path) -> None:
    folder = tmp_path / "controls"
    folder.mkdir()
    write_safetensors(folder / "ip.safetensors", adapter_for(pipe, "plus").state_dict())
    tower.rename(folder / "tower")
    try:
        pipe.controls.load(folder / "ip.safetensors", vision=folder / "tower")
        hint = write_png(tmp_path / "hint.png", gradient_image(40))
        images = pipe.text_to_image("a cat", controls=[ldm.Control("ip", hint, end=0.8)], **CALL)
        again = replay(images.recipe, weights="random", controls=folder)
        assert torch.equal(again.tensor, images.tensor)
        ldm.optimize(pipe)
        fast = pipe.text_to_image("a cat", controls=[ldm.Control("ip", hint, end=0.8)], **CALL)
        assert (fast.tensor - images.tensor).abs().max() < 1e-3
    finally:
        pipe.controls.remove("ip")
        (folder / "tower").rename(tower)


def test_refusals(pipe: Any, tower: Path, tmp_path: Path) -> None:
    state = adapter_for(pipe, "base").state_dict()
    write_safetensors(tmp_path / "ip.safetensors", state)
    with pytest.raises(ValueError, match="pass vision= with CLIP's image tower"):
        pipe.controls.load(tmp_path / "ip.safetensors")
    wide = {**state, "image_proj.proj.weight": torch.zeros(128, 20)}
    nan = {**state, "ip_adapter.1.to_k_ip.weight": state["ip_adapter.1.to_k_ip.weight"] * torch.nan}
    other = {key: torch.zeros(value.shape[0], 48) if "_ip." in key else value for key, value in state.items()}
    few = {key: value for key, value in state.items() if not key.startswith("ip_adapter.1.")}
    for tensors, message in (
        (wide, "reads an embedding of width 20, those of the image tower have 24"),
        (nan, "NaN or infinity"),
        (other, "was made for a model with a context of 48"),
        (few, r"has \d+ attentions"),
        ({key: v for key, v in state.items() if key != "image_proj.norm.bias"}, "missing"),
    ):
        write_safetensors(tmp_path / "bad.safetensors", tensors)
        with pytest.raises(ValueError, match=message):
            pipe.controls.load(tmp_path / "bad.safetensors", vision=tower)
    assert len(pipe.controls) == 0
