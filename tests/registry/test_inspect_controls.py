"""`ldm inspect` on controls: kind, layout, family, counts, how they fit, and nothing executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from control_nets import peer_of, random_control_net, reduced_config
from malicious_files import canary_ckpt

from ldm.models.control.ip_adapter import IPAdapterConfig
from ldm.models.control.t2i_adapter import T2IAdapterConfig
from ldm.models.unet_config import UNetConfig
from ldm.registry.inspection import inspect
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import build_network, randomise, to_layout


def network(context: int = 768) -> Any:
    shape = UNetConfig(channels=(32, 64), depth=(1, 0), blocks=1, heads=4, context_dim=context)
    return random_control_net(reduced_config(shape))


def test_control_nets_in_both_layouts(tmp_path: Path) -> None:
    made = network()
    write_safetensors(tmp_path / "x-canny.safetensors", to_layout(made, "original"))
    peer_of(made).save_pretrained(tmp_path / "folder")
    count = sum(p.numel() for p in made.parameters())
    for path, layout in ((tmp_path / "x-canny.safetensors", "original"), (tmp_path / "folder", "diffusers")):
        report = inspect(path, nan=True)
        text = report.text()
        assert f"a ControlNet in {layout} layout" in text and "no NaN" in text
        assert report.made_for == "Stable Diffusion 1" and "4 zero convolutions" in text
        assert report.parts[0].parameters == count and f"{count:,} parameters" in text
        assert "it does not fit sd-v1-5" in text and report.sha256
    assert "canny: hints are edges" in inspect(tmp_path / "x-canny.safetensors").text()


def test_the_model_in_an_original_file_is_counted(tmp_path: Path) -> None:
    state = {f"control_model.{key}": value for key, value in to_layout(network(20), "original").items()}
    torch.save(
        {"state_dict": {**state, "model.diffusion_model.out.2.bias": torch.zeros(4)}}, tmp_path / "a.pth"
    )
    report = inspect(tmp_path / "a.pth")
    assert report.made_for == "a model with a context of 20" and not report.problems
    assert "1 tensors of the model that it was trained with" in report.text()


def test_other_kinds(tmp_path: Path) -> None:
    configs = {
        "T2I-Adapter": (T2IAdapterConfig(channels=(8, 8, 8, 8)), "Stable Diffusion 1 or 2"),
        "IP-Adapter": (
            IPAdapterConfig(image_dim=8, context_dim=2048, widths=(8, 8)),
            "Stable Diffusion XL",
        ),
    }
    for kind, (config, family) in configs.items():
        path = tmp_path / f"{kind}.safetensors"
        write_safetensors(path, to_layout(randomise(build_network(config)), "original"))
        report = inspect(path)
        assert f"a {kind} in original layout" in report.text() and report.made_for == family
    state = {**to_layout(network(), "original"), "lora_controlnet": torch.zeros(0)}
    write_safetensors(tmp_path / "lora.safetensors", state)
    assert "a Control-LoRA in original layout" in inspect(tmp_path / "lora.safetensors").text()


def test_nothing_is_executed(tmp_path: Path) -> None:
    canary_ckpt(tmp_path / "evil.pth", tmp_path / "executed")
    assert inspect(tmp_path / "evil.pth").unsafe and not (tmp_path / "executed").exists()
