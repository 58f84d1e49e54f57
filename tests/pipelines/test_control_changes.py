"""Control-LoRAs and difference files: the ControlNet that they stand for, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from control_nets import lines, random_control_net, reduced_config
from diffusers_pipelines import random_pipeline
from torch import Tensor

from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.keymap import to_file
from ldm.weights.parts import part_table, to_layout

CALL: dict[str, Any] = {"steps": 2, "seed": 3, "sampler": "ddim", "progress": False}
HINT = lines(32)
RANK = 2


@pytest.fixture(scope="module", params=["sd-v1-5", "sdxl-base"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_pipeline(request.param, "reduced", tmp_path_factory.mktemp("pipe"))[0]


def base_in_file(pipe: Any, network: Any) -> dict[str, Tensor]:
    """Return the UNet's tensors of the encoder, under the names of the original layout."""
    own = network.state_dict()
    state = {name: value for name, value in pipe.networks()["unet"].state_dict().items() if name in own}
    state |= {name: value for name, value in own.items() if name.startswith("controlnet_")}
    return to_file(part_table(network, "original", ()), state)


def assert_stands_for(pipe: Any, path: Path, whole: dict[str, Tensor], tmp_path: Path, what: str) -> None:
    write_safetensors(tmp_path / "whole.safetensors", whole)
    change, full = pipe.controls.load(path, name="change"), pipe.controls.load(tmp_path / "whole.safetensors")
    try:
        assert change.what == what
        state = full.network.state_dict()
        for name, value in change.network.state_dict().items():
            assert torch.allclose(value, state[name], atol=1e-6), name
        a, b = (
            pipe.text_to_image("a cat", controls=[(name, HINT)], **CALL).tensor
            for name in ("change", "whole")
        )
        assert torch.allclose(a, b, atol=1e-4)
    finally:
        pipe.controls.remove("change")
        pipe.controls.remove("whole")


def test_differences_are_added_to_the_unet(pipe: Any, tmp_path: Path) -> None:
    network = random_control_net(reduced_config(pipe.networks()["unet"].config))
    whole, base = to_layout(network, "original"), base_in_file(pipe, network)
    own = ("zero_convs", "input_hint_block", "middle_block_out")
    difference = {key: v if key.startswith(own) else v - base[key] for key, v in whole.items()}
    path = tmp_path / "diff.safetensors"
    write_safetensors(path, {**difference, "difference": torch.ones(())})
    assert_stands_for(pipe, path, whole, tmp_path, "ControlNet, as a difference to the UNet")


def test_control_loras_are_added_to_the_unet(pipe: Any, tmp_path: Path) -> None:
    network = random_control_net(reduced_config(pipe.networks()["unet"].config))
    own, base = to_layout(network, "original"), base_in_file(pipe, network)
    g = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {"lora_controlnet": torch.tensor([])}
    whole = {}
    for key, value in own.items():
        if key.startswith(("zero_convs", "input_hint_block", "middle_block_out")) or value.ndim == 1:
            state[key] = whole[key] = value
        elif "emb_layers" in key:
            whole[key] = base[key]  # what the file lacks is the UNet's
        else:
            stem, inputs = key.removesuffix(".weight"), value[0].numel()
            up = torch.randn(len(value), RANK, *[1] * (value.ndim - 2), generator=g)
            down = 0.1 * torch.randn(RANK, *value.shape[1:], generator=g)
            state |= {f"{stem}.up": up, f"{stem}.down": down}
            whole[key] = base[key] + (up.flatten(1) @ down.reshape(RANK, inputs)).reshape(value.shape)
    path = tmp_path / "lora.safetensors"
    write_safetensors(path, state)
    assert_stands_for(pipe, path, whole, tmp_path, "Control-LoRA")

    stem = next(key.removesuffix(".up") for key in state if key.endswith(".up"))
    for tensors, message in (
        ({key: v for key, v in state.items() if key != f"{stem}.down"}, "unexpected"),
        ({**state, f"{stem}.down": state[f"{stem}.down"][:1]}, "do not fit a weight"),
        ({**state, f"{stem}.up": state[f"{stem}.up"] * torch.nan}, "NaN or infinity"),
        ({**state, "nowhere.up": torch.zeros(1), "nowhere.down": torch.zeros(1)}, "unexpected"),
        ({key: v for key, v in state.items() if key != "zero_convs.0.0.bias"}, "missing"),
    ):
        write_safetensors(path, tensors)
        with pytest.raises(ValueError, match=message):
            pipe.controls.load(path)
    assert len(pipe.controls) == 0


def test_adapters_must_not_be_merged(pipe: Any, tmp_path: Path) -> None:
    """What a change is added to is the model's own weight, whatever is loaded later."""
    network = random_control_net(reduced_config(pipe.networks()["unet"].config))
    path = tmp_path / "diff.safetensors"
    write_safetensors(path, {**to_layout(network, "original"), "difference": torch.ones(())})
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    weight = pipe.networks()["unet"].mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    lora = {
        f"{stem}.lora_up.weight": torch.ones(len(weight), 1),
        f"{stem}.lora_down.weight": torch.ones(1, weight.shape[1]),
    }
    write_safetensors(tmp_path / "lora.safetensors", lora)
    pipe.adapters.load(tmp_path / "lora.safetensors", name="style")
    try:
        with pytest.raises(ValueError, match="remove or fuse them first"):
            pipe.controls.load(path)
    finally:
        pipe.adapters.remove("style")
    pipe.controls.load(path)
    pipe.controls.remove("diff")
