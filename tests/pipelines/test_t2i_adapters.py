"""T2I-Adapters of pipelines: parity with diffusers, alone and with a ControlNet, layouts and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import reduced_families
import torch
from control_nets import adapter_peer, lines, random_control_net, reduced_config
from diffusers_pipelines import assert_equal, differ, diffusers_pipeline, diffusers_scheduler
from reduced_families import NETWORKS, SDXL

import ldm
from ldm.models.control.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import build_network, randomise, to_layout

CALL: dict[str, Any] = {"steps": 5, "seed": 3, "sampler": "ddim", "progress": False}
HINT = lines(32)
SHAPES = {
    "sd-v1-5": T2IAdapterConfig(unshuffle=2, channels=(32, 64), halved=(False, True)),
    "sdxl-base": T2IAdapterConfig(unshuffle=4, channels=(32, 64, 64, 64), halved=(False, False, True, False)),
}
CLASSES = {
    "sd-v1-5": "StableDiffusionAdapterPipeline",
    "sdxl-base": "StableDiffusionXLAdapterPipeline",
}
# XL's adapters halve the size once, so that its UNet needs three levels
XL = {**NETWORKS["sdxl-base"], "unet": {**SDXL, "channels": [32, 64, 64], "depth": [0, 1, 2]}}


@pytest.fixture(scope="module", params=list(SHAPES))
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pipe")
    changes = {"networks": XL} if request.param == "sdxl-base" else {}
    made = reduced_families.load(reduced_families.register(request.param, folder, **changes).name)
    return made


def adapter_for(pipe: Any) -> T2IAdapter:
    made: Any = randomise(build_network(SHAPES[pipe.name.removeprefix("tiny-")]), 3)
    return made


def test_parity_with_diffusers(pipe: Any, tmp_path: Path) -> None:
    base = pipe.name.removeprefix("tiny-")
    network = adapter_for(pipe)
    paths = {
        "a": tmp_path / "a.safetensors",
        "b": tmp_path / "b.safetensors",
        "c": tmp_path / "folder",
        "d": tmp_path / "d.pth",
    }
    write_safetensors(paths["a"], to_layout(network, "original"))
    write_safetensors(paths["b"], {f"adapter.{k}": v for k, v in to_layout(network, "diffusers").items()})
    peer = adapter_peer(network)
    peer.save_pretrained(paths["c"])
    torch.save({"adapter": to_layout(network, "original")}, paths["d"])
    for name, path in paths.items():
        loaded = pipe.controls.load(path, name=name)
        assert loaded.what == "T2I-Adapter"
        assert all(
            torch.equal(loaded.network.state_dict()[key], value)
            for key, value in network.state_dict().items()
        )
    own = pipe.text_to_image("a cat", controls=[ldm.Control("a", HINT, strength=0.7, end=0.6)], **CALL).tensor
    kind = "StableDiffusionPipeline" if base == "sd-v1-5" else "StableDiffusionXLPipeline"
    parts = diffusers_pipeline(pipe, kind, tmp_path).components
    theirs = getattr(diffusers, CLASSES[base])(
        **{name: part for name, part in parts.items() if name != "image_encoder"},
        adapter=peer,
        **({"requires_safety_checker": False} if base == "sd-v1-5" else {}),
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers_scheduler(pipe, "ddim")
    factor = {} if base == "sd-v1-5" else {"adapter_conditioning_factor": 0.6}
    if base == "sd-v1-5":  # its pipeline has no end
        own = pipe.text_to_image("a cat", controls=[("b", HINT, 0.7)], **CALL).tensor
    wanted = theirs(
        "a cat",
        image=HINT,
        num_inference_steps=5,
        latents=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)),
        guidance_scale=pipe.card.defaults.guidance,
        adapter_conditioning_scale=0.7,
        output_type="pt",
        height=32,
        width=32,
        **factor,
    ).images
    if not isinstance(wanted, torch.Tensor):
        wanted = torch.from_numpy(wanted).permute(0, 3, 1, 2)
    assert_equal(own, wanted)
    plain = pipe.text_to_image("a cat", **CALL).tensor
    assert differ(own, plain)
    fast = pipe.text_to_image("a cat", controls=[("c", HINT, 0.4), ("d", HINT, 0.3)], **CALL).tensor
    whole = pipe.text_to_image("a cat", controls=[("a", HINT, 0.7)], **CALL).tensor
    assert torch.allclose(fast, whole, atol=1e-3), "adapters add up"
    control = random_control_net(reduced_config(pipe.networks()["unet"].config))
    write_safetensors(tmp_path / "net.safetensors", to_layout(control, "original"))
    pipe.controls.load(tmp_path / "net.safetensors")
    both = pipe.text_to_image("a cat", controls=[("net", HINT, 0.3), ("a", HINT, 0.7)], **CALL).tensor
    assert differ(both, whole)


def test_refused_files(pipe: Any, tmp_path: Path) -> None:
    before = [each.name for each in pipe.controls.list()]
    state = to_layout(adapter_for(pipe), "original")
    other = T2IAdapterConfig(unshuffle=16, channels=(8, 8, 8, 8), halved=(False, False, True, False))
    files = {
        "nan": ({**state, "body.0.block1.bias": torch.full((32,), torch.nan)}, "NaN or infinity"),
        "short": ({key: value for key, value in state.items() if key != "body.1.block2.bias"}, "missing"),
        "extra": ({**state, "skep.weight": torch.zeros(1)}, "unexpected"),
        "other": (
            to_layout(randomise(build_network(other)), "original"),
            "was made for Stable Diffusion XL: it reads squares of 16 pixels",
        ),
    }
    for name, (tensors, message) in files.items():
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(ValueError, match=message):
            pipe.controls.load(tmp_path / f"{name}.safetensors")
    assert [each.name for each in pipe.controls.list()] == before
