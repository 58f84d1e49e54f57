"""Controls whose keys or shapes are damaged are refused at once, with the file's name and a reason."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from kinds_of_controls import ATTENTION, control_states, target
from torch import Tensor

from ldm.catalog.control_cards import CONTROL_CARDS
from ldm.registry.inspection import inspect
from ldm.weights.controls.building import IP_ADAPTER_KIND, build_control, control_kind
from ldm.weights.controls.files import read_control
from ldm.weights.controls.lllite import lllite_config
from ldm.weights.formats.safetensors import write_safetensors


def written(folder: Path, state: Mapping[str, Tensor]) -> Path:
    path = folder / "control.safetensors"
    write_safetensors(path, {name: tensor.contiguous() for name, tensor in state.items()})
    return path


def build(path: Path) -> object:
    file = read_control(path)
    model = target(vision=control_kind(file) == IP_ADAPTER_KIND)
    return build_control(file, model, CONTROL_CARDS["canny"])


def refused(path: Path, message: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        build(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 3000
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("kind", control_states())
def test_whole_files_of_every_kind_are_built(kind: str, tmp_path: Path) -> None:
    assert build(written(tmp_path, control_states()[kind]))


@pytest.mark.parametrize(
    ("kind", "key", "shape"),
    [
        ("ControlNet", "input_hint_block.0.weight", ()),
        ("ControlNet", "input_hint_block.0.weight", (8,)),
        ("ControlNet", "input_hint_block.2.weight", ()),
        ("ControlNet", "input_blocks.0.0.weight", (32,)),
        ("ControlNet of diffusers", "controlnet_cond_embedding.conv_in.weight", (8,)),
        ("ControlNet of diffusers", "conv_in.weight", ()),
        ("ControlNet Union", "task_embedding", ()),
        ("T2I-Adapter", "conv_in.weight", (8,)),
        ("T2I-Adapter", "body.0.block1.weight", ()),
        ("T2I-Adapter of diffusers", "body.0.resnets.0.block1.weight", ()),
        ("light T2I-Adapter", "body.0.in_conv.weight", (8,)),
        ("light T2I-Adapter", "body.1.out_conv.weight", ()),
        ("IP-Adapter", "image_proj.proj.weight", (8,)),
        ("IP-Adapter Plus", "image_proj.latents", (4,)),
        ("IP-Adapter Plus", "image_proj.proj_in.weight", ()),
        ("IP-Adapter Plus", "image_proj.layers.0.0.to_q.weight", ()),
        ("IP-Adapter full face", "image_proj.proj.0.weight", (8,)),
        ("ControlNet-LLLite", f"{ATTENTION}.conditioning1.0.weight", ()),
        ("ControlNet-LLLite", f"{ATTENTION}.conditioning1.2.weight", (8,)),
    ],
)
def test_tensors_with_too_few_dimensions_are_refused(
    kind: str, key: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    state = control_states()[kind]
    assert key in state
    refused(written(tmp_path, {**state, key: torch.zeros(shape)}), "expected at least|does not fit")


@pytest.mark.parametrize("shape", [(), (8,)])
def test_keys_of_ip_adapters_have_two_dimensions(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = {
        key: torch.zeros(shape) if key.endswith(".to_k_ip.weight") else tensor
        for key, tensor in control_states()["IP-Adapter"].items()
    }
    path = written(tmp_path, state)
    refused(path, "to_k_ip.weight has the shape")
    with pytest.raises(ValueError, match="control.safetensors.*to_k_ip.weight has the shape"):
        inspect(path)


@pytest.mark.parametrize("leaf", ["up", "down"])
def test_factors_of_control_loras_are_matrices(leaf: str, tmp_path: Path) -> None:
    state = control_states()["Control-LoRA"]
    key = next(key for key in state if key.endswith(f".{leaf}"))
    refused(written(tmp_path, {**state, key: torch.zeros(())}), "expected two dimensions")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("T2I-Adapter", "body.999999999.block1.weight"),
        ("T2I-Adapter of diffusers", "body.999999999.resnets.0.block1.weight"),
        ("light T2I-Adapter", "body.0.body.999999999.block1.weight"),
        ("IP-Adapter Plus", "image_proj.layers.999999999.0.to_q.weight"),
        ("ControlNet", "input_blocks.1.1.transformer_blocks.999999999.norm1.weight"),
        ("ControlNet Union", "transformer_layes.999999999.x"),
    ],
)
def test_a_number_in_a_key_is_no_number_of_parts(kind: str, key: str, tmp_path: Path) -> None:
    state = {**control_states()[kind], key: torch.zeros(1)}
    refused(written(tmp_path, state), r"the last of number 9{9}: expected at most 64, numbered from 0 on")


def test_no_more_parts_are_built_than_a_network_may_have(tmp_path: Path) -> None:
    block = "input_blocks.1.1.transformer_blocks"
    many = {f"{block}.{i}.norm1.weight": torch.zeros(1) for i in range(20_000)}
    refused(written(tmp_path, {**control_states()["ControlNet"], **many}), "20000 blocks of .*at most 64")


def test_names_of_a_resampler_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    state = {**control_states()["IP-Adapter Plus"], "image_proj.layers.x.weight": torch.zeros(1)}
    refused(written(tmp_path, state), "unexpected .image_proj.layers.x.weight")


def test_a_hint_encoder_of_one_convolution(tmp_path: Path) -> None:
    """The hint has the size of the latent: only a missing key is wrong, and no maximum of nothing."""
    state = {
        key: tensor
        for key, tensor in control_states()["ControlNet"].items()
        if not key.startswith(("input_hint_block.2.", "input_hint_block.4.", "input_hint_block.6."))
    }
    refused(written(tmp_path, state), "does not fit: .*input_hint_block.2.weight")


def test_the_time_for_many_networks_of_a_lllite_is_linear() -> None:
    shapes = {
        f"lllite_unet_x{i}.{part}.weight": shape
        for i in range(10_000)
        for part, shape in (
            ("conditioning1.0", (4, 3, 4, 4)),
            ("conditioning1.2", (8, 4, 2, 2)),
            ("down.0", (4, 8)),
            ("mid.0", (4, 12)),
            ("up.0", (8, 4)),
        )
    }
    begin = time.process_time()
    assert len(lllite_config(shapes, source="x").layers) == 10_000
    assert time.process_time() - begin < 4
