"""Single files: parts, averages, the latent scale, and tensors that belong to no part."""

from __future__ import annotations

from pathlib import Path

import malicious_files
import pytest
import torch
from original_keys import UNETS
from sparse_files import sd1_shapes, sparse_file

from ldm.models.unet import UNet, UNetConfig
from ldm.registry.inspection import inspect
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.formats.single_file import (
    Stated,
    choose_ema,
    ema_names,
    read_single,
    read_tensors,
    stated_sampling,
)
from ldm.weights.keymap import from_file
from ldm.weights.rules.unet import unet_table
from ldm.weights.strict import load_strict


def test_a_full_size_file_comes_apart_and_fills_our_network(tmp_path: Path) -> None:
    single = read_single(sparse_file(tmp_path / "sd.safetensors", sd1_shapes()))
    assert single.found.name == "sd1"
    assert {name: len(part) for name, part in single.parts.items()} == {
        "unet": UNETS["sd1"][2],
        "vae": 248,
        "text": 2,
    }
    assert (single.ema, single.scale_factor) == (False, None)
    with torch.device("meta"):
        net = UNet(UNetConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    state = from_file(unet_table(shapes), single.parts["unet"], shapes, source=single.path)
    # the numbers are not read: they are holes in the sparse file
    load_strict(net, state, source=single.path, allow_nan=True)
    assert net.conv_in.weight.dtype == torch.float16


def test_tensors_that_belong_to_nothing_are_an_error(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "sd.safetensors", sd1_shapes() | {"mystery.weight": (3,)})
    with pytest.raises(ValueError, match=r"sd\.safetensors.*belong to no part.*mystery\.weight"):
        read_single(path)


def test_a_unet_alone(tmp_path: Path) -> None:
    keys = {
        key.removeprefix("model.diffusion_model."): shape
        for key, shape in sd1_shapes().items()
        if key.startswith("model.d")
    }
    single = read_single(sparse_file(tmp_path / "unet.safetensors", keys))
    assert single.parts.keys() == {"unet"}


def test_the_wrong_kind_of_file(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "lora.safetensors",
        {"a.lora_down.weight": torch.zeros(2, 2), "a.lora_up.weight": torch.zeros(2, 2)},
    )
    with pytest.raises(ValueError, match=r"lora\.safetensors.*LoRA.*added to a model"):
        read_single(tmp_path / "lora.safetensors")


def test_averages_by_choice() -> None:
    one, two = torch.ones(1), torch.full((1,), 2.0)
    state = {
        "model.diffusion_model.a.b": one,
        "model_ema.diffusion_modelab": two,
        "model_ema.decay": one,
        "first_stage_model.a.b": one,
    }
    for ema, wanted in ((None, 2.0), (True, 2.0), (False, 1.0)):
        chosen, averaged = choose_ema(state, ema, source="x")
        assert chosen["model.diffusion_model.a.b"].item() == wanted
        assert chosen["first_stage_model.a.b"].item() == 1.0
        assert averaged == (wanted == 2.0)
        assert not any(key.startswith("model_ema") for key in chosen)
    del state["model_ema.diffusion_modelab"]
    assert choose_ema(state, None, source="x")[1] is False
    with pytest.raises(ValueError, match=r"x\.ckpt.*no averaged"):
        choose_ema(state, True, source="x.ckpt")


def test_averages_of_some_tensors_only_are_not_mixed_in_silence() -> None:
    state = {
        name: torch.ones(1)
        for name in ("model.diffusion_model.a", "model.diffusion_model.b", "model_ema.diffusion_modela")
    }
    with pytest.raises(ValueError, match=r"1 of 2 tensors.*diffusion_model\.b"):
        choose_ema(state, None, source="x")
    assert choose_ema(state, False, source="x")[1] is False


def test_names_without_dots_may_collide(tmp_path: Path) -> None:
    names = ["model.d.a.bc", "model.d.ab.c", "model_ema.dabc"]
    with pytest.raises(ValueError, match=r"may be the average of"):
        ema_names(names)
    with pytest.raises(ValueError, match=r"a\.ckpt.*may be the average of"):
        choose_ema({name: torch.ones(1) for name in names}, None, source="a.ckpt")
    write_safetensors(tmp_path / "a.safetensors", {name: torch.ones(1) for name in names})
    assert any("may be the average" in problem for problem in inspect(tmp_path / "a.safetensors").problems)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "renamed.bin"])
def test_the_content_decides_how_a_file_is_read(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path / name, {"x": torch.ones(2)})
    assert read_tensors(tmp_path / name)[0]["x"].tolist() == [1, 1]
    torch.save({"x": torch.ones(2)}, tmp_path / "real.ckpt")
    assert read_tensors(tmp_path / "real.ckpt")[0]["x"].tolist() == [1, 1]


def test_hostile_files_are_refused_here_too(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    with pytest.raises(ValueError, match=r"bad\.ckpt.*refused"):
        read_single(malicious_files.canary_ckpt(tmp_path / "bad.ckpt", mark))
    assert not mark.exists()


def test_the_scale_that_a_file_states(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "sd.safetensors", sd1_shapes() | {"scale_factor": ()})
    with path.open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x00\x38")  # 0.5 in half precision
    assert read_single(path).scale_factor == 0.5


def test_the_prefix_of_data_parallel_training_is_removed(tmp_path: Path) -> None:
    keys = {f"module.{key}": shape for key, shape in sd1_shapes().items()}
    single = read_single(sparse_file(tmp_path / "sd.safetensors", keys))
    assert single.found.name == "sd1" and single.parts.keys() == {"unet", "vae", "text"}


def test_the_text_tower_of_sd_turbo_is_found_below_its_own_prefix(tmp_path: Path) -> None:
    text = {"conditioner.embedders.0.model.positional_embedding": (77, 1024)}
    keys = sd1_shapes("sd2") | text
    keys = {key: shape for key, shape in keys.items() if not key.startswith("cond_stage_model.")}
    single = read_single(sparse_file(tmp_path / "sd_turbo.safetensors", keys), family="sd2")
    assert single.parts["text"].keys() == {"positional_embedding"}


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae.", "whole"])
def test_an_autoencoder_is_found_wherever_it_stands(tmp_path: Path, prefix: str) -> None:
    vae = {
        key.removeprefix("first_stage_model."): shape
        for key, shape in sd1_shapes().items()
        if key.startswith("first_stage_model.")
    }
    keys = sd1_shapes() if prefix == "whole" else {prefix + key: shape for key, shape in vae.items()}
    single = read_single(sparse_file(tmp_path / "vae.safetensors", keys), family="first-stage-kl")
    assert single.parts.keys() == {"vae"} and single.parts["vae"].keys() == vae.keys()


@pytest.mark.parametrize(
    ("markers", "metadata", "expected"),
    [
        ({}, {}, Stated()),
        ({"v_pred": torch.zeros(0)}, {}, Stated("v")),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, Stated("v", True)),
        ({}, {"modelspec.prediction_type": "v"}, Stated("v")),
        ({}, {"modelspec.prediction_type": "epsilon"}, Stated("eps")),
        ({"v_pred": torch.zeros(0)}, {"modelspec.prediction_type": "v"}, Stated("v")),
    ],
)
def test_what_a_file_states_about_sampling(markers, metadata, expected) -> None:
    assert stated_sampling(markers, metadata) == expected


def test_contradictory_and_unknown_statements_are_errors() -> None:
    with pytest.raises(ValueError, match="v_pred and .*'epsilon' contradict"):
        stated_sampling({"v_pred": torch.zeros(0)}, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="'flow': expected one of 'epsilon', 'v'"):
        stated_sampling({}, {"modelspec.prediction_type": "flow"})


@pytest.mark.parametrize(
    "scale",
    [
        *(torch.tensor(x) for x in (0.0, -1.0, float("nan"), float("inf"), 1j)),
        *(torch.ones(2), torch.ones(0)),
    ],
    ids=str,
)
def test_a_scale_that_is_no_number_above_0_is_refused(scale: torch.Tensor, tmp_path: Path) -> None:
    state = {"decoder.up.0.block.0.conv1.weight": torch.ones(2, 2, 3, 3), "scale_factor": scale}
    write_safetensors(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match=r"a\.safetensors': scale_factor"):
        read_single(tmp_path / "a.safetensors", family="first-stage-kl")
