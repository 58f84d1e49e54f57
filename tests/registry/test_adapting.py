"""Files of adapters made from others and from models: conversion, resizing, merging, extraction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import KOHYA, KOHYA_XL, kohya_lora, lora_tensors, peers, targets, weights_of, written
from diffusers_pipelines import random_pipeline
from tiny_latent_diffusion import tiny_model
from torch import Tensor

import ldm
from ldm.cli.commands import run_command_line
from ldm.images.files import read_recipe
from ldm.registry.adapting import convert_adapter, extract_adapter, merge_adapters, resize_adapter
from ldm.weights.adapters.kinds.low_rank import LowRank
from ldm.weights.adapters.kinds.table import deltas_of
from ldm.weights.adapters.reduction import extracted, joined, resized
from ldm.weights.formats.safetensors import map_safetensors, read_safetensors


def lora(rank: int, shape: tuple[int, ...], seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *[1] * len(shape[2:]), generator=generator)
    return LowRank(up=up, down=down, scale=0.5)


def change(delta: LowRank, shape: tuple[int, ...]) -> Tensor:
    return delta.difference(shape, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(12, 20), (12, 8, 3, 3), (16, 12, 1, 1)])
def test_low_rank_matrices(shape: tuple[int, ...]) -> None:
    """The best approximation has the error of the singular values that are left out (Eckart & Young)."""
    own = lora(6, shape)
    whole = change(own, shape)
    assert torch.allclose(change(extracted(whole, 6), shape), whole, atol=1e-5)
    values = torch.linalg.svdvals(whole.flatten(1))
    for small in (extracted(whole, 2), resized(own, 2)):
        error = (change(small, shape) - whole).norm()
        assert small.rank == 2 and torch.allclose(error, values[2:].norm(), rtol=1e-4)
    kept = resized(own, keep=0.9)
    assert (values[: kept.rank].square().sum() / values.square().sum()) >= 0.9
    assert kept.rank == 1 or (values[: kept.rank - 1].square().sum() / values.square().sum()) < 0.9
    other = lora(3, shape, seed=1)
    both = joined([(own, 0.5), (other, -2.0)])
    assert both.rank == 9
    assert torch.allclose(change(both, shape), 0.5 * whole - 2 * change(other, shape), atol=1e-4)
    assert resized(joined([(own, 1.0), (own, 1.0)])).rank == 6  # the rank that is needed


def test_clamping_cuts_the_largest_entries() -> None:
    whole = change(lora(6, (30, 20)), (30, 20))
    cut, plain = extracted(whole, 4, clamp=0.9), extracted(whole, 4)
    assert (change(cut, (30, 20)) - whole).norm() > (change(plain, (30, 20)) - whole).norm()


def test_leaves_are_read_back() -> None:
    own = lora(3, (8, 6))
    delta, _, left = deltas_of(own.leaves(), lambda rank: 1.0)
    assert delta is not None and not left
    assert torch.equal(delta.apply(torch.zeros(8, 6), 1.0), own.apply(torch.zeros(8, 6), 1.0))


@pytest.fixture(scope="module", params=["sd-v1-5", "sdxl-base"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a reduced pipeline, which is registered as tiny-NAME."""
    return random_pipeline(request.param, "reduced", tmp_path_factory.mktemp("model"))[0]


def merged(pipe: Any, path: Path) -> dict[str, Tensor]:
    pipe.adapters.load(path, name="x")
    found = weights_of(pipe)
    pipe.adapters.remove("x")
    return found


@pytest.mark.parametrize("names", ["kohya", "diffusers", "peft"])
def test_conversion_changes_no_weight(model: Any, tmp_path: Path, names: str) -> None:
    prefixes = KOHYA_XL if "text2" in model.networks() else KOHYA
    state = kohya_lora(peers(model), prefixes)
    some = [key for key in state if "attn2_to_k" in key and key.endswith(".lora_down.weight")]
    for key in some:  # a module of another rank and alpha
        state[key], up = state[key][:2], key.replace("lora_down", "lora_up")
        state[up] = state[up][:, :2]
        state[key.replace("lora_down.weight", "alpha")] = torch.tensor(5.0)
    path = written(tmp_path / "a.safetensors", state, {"ss_output_name": "a"})
    wanted = merged(model, path)
    to = tmp_path / ("folder" if names == "peft" else f"{names}.safetensors")
    convert_adapter(path, to, names=names, model=model.name)
    if names == "peft":
        files = [to / part for part in ("unet", "text_encoder")]
        found = dict(wanted)
        for file in files:
            now = merged(model, file)
            part = "denoiser" if file.name == "unet" else "text"
            found |= {key: value for key, value in now.items() if key.startswith(part)}
        if "text2" in model.networks():
            return  # the towers' modules have the same names
    else:
        found = merged(model, to)
        assert map_safetensors(to)[1]["ss_output_name"] == "a"
    assert all(torch.allclose(found[key], wanted[key], atol=1e-7) for key in wanted)
    if names == "diffusers":
        back = convert_adapter(to, tmp_path / "back.safetensors", names="kohya", model=model.name)
        again = read_safetensors(back)
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_diffusers_reads_what_is_converted(model: Any, tmp_path: Path) -> None:
    """The UNet with diffusers' own loader computes what ours does."""
    unet, prefixes = peers(model)["unet"], KOHYA
    path = written(tmp_path / "a.safetensors", kohya_lora({"unet": unet}, prefixes))
    wanted = merged(model, path)
    to = convert_adapter(path, tmp_path / "b.safetensors", names="diffusers", model=model.name)
    state, metadata = map_safetensors(to)
    assert all(key.startswith("unet.") for key in state)
    config = json.loads(metadata["lora_adapter_metadata"])
    unet.load_lora_adapter(dict(state), prefix="unet", metadata=config)
    unet.fuse_lora()
    unet.unload_lora()
    for name, value in unet.state_dict().items():
        assert torch.allclose(value, wanted[f"denoiser.net.{name}"], atol=1e-6), name


def test_resizing_and_merging(model: Any, tmp_path: Path) -> None:
    unet = {"unet": peers(model)["unet"]}
    first = written(tmp_path / "a.safetensors", kohya_lora(unet, KOHYA))
    plain, one = weights_of(model), merged(model, first)
    sums = merge_adapters([(first, 1.0), (first, 0.5)], tmp_path / "sum.safetensors", model=model.name)
    small = resize_adapter(sums, tmp_path / "small.safetensors", model=model.name)
    for path in (sums, small):
        found = merged(model, path)
        for key, value in found.items():
            expected = plain[key] + 1.5 * (one[key] - plain[key])
            assert torch.allclose(value, expected, atol=1e-5), key
    ranks = {len(value) for key, value in read_safetensors(small).items() if "lora_down" in key}
    assert max(ranks) <= 4  # the sum of a LoRA with itself needs no larger rank
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        resize_adapter(sums, tmp_path / "x.safetensors", rank=0, model=model.name)


def test_extraction_of_a_change_of_low_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model plus a LoRA of rank 3: the extracted LoRA makes the same model of the plain one."""
    ldm.save(tiny_model(), tmp_path / "assets" / "emoji-ldm")
    monkeypatch.setattr("ldm.catalog.lookup.ASSETS", tmp_path / "assets")
    pipe = ldm.load(device="cpu", dtype="float32")
    base = ldm.save(pipe, tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, module in targets(pipe.denoiser.net, ("to_q", "to_v")).items():
        down, up = lora_tensors(module, 3, generator)
        state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    pipe.adapters.load(written(tmp_path / "a.safetensors", state))
    pipe.adapters.fuse()
    with torch.no_grad():
        pipe.denoiser.net.conv_in.bias += 1
    tuned, wanted = ldm.save(pipe, tmp_path / "tuned"), weights_of(pipe)
    to = tmp_path / "out.safetensors"
    options = {"model": "emoji-ldm", "rank": 3, "dtype": torch.float32}
    _, left = extract_adapter(base, tuned, to, **options)  # type: ignore[arg-type]
    assert left == ["unet: conv_in.bias"]
    assert sum(key.endswith("lora_up.weight") for key in read_safetensors(to)) == len(state) / 2
    other = ldm.load(device="cpu", dtype="float32")
    found = merged(other, to)
    for key, value in found.items():
        assert key.endswith("conv_in.bias") or torch.allclose(value, wanted[key], atol=1e-5), key
    command = ["adapters", "extract", str(base), str(tuned), "--model", "emoji-ldm", "--rank", "2"]
    assert run_command_line([*command, "-o", str(tmp_path / "cli.safetensors")]) == 0
    assert "1 tensors differ and are not in the adapter" in capsys.readouterr().err
    with pytest.raises(ValueError, match="differs from .* in no module"):
        extract_adapter(base, base, to, **options)  # type: ignore[arg-type]
    assert run_command_line(["adapters", "merge", f"{to}:0.5", "-o", str(tmp_path / "m.safetensors")]) == 2
    assert "state the model" in capsys.readouterr().err


def test_the_option_of_image_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = ldm.load(device="cpu", dtype="float32")
    (name, module), *_ = targets(pipe.denoiser.net, ("to_q",)).items()
    down, up = lora_tensors(module, 3, torch.Generator().manual_seed(0))
    state = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    path, out = written(tmp_path / "a.safetensors", state), tmp_path / "cat.png"
    options = ["--steps", "1", "--dtype", "float32", "--device", "cpu", "-o", str(out)]
    assert run_command_line(["cat", "--adapter", f"{path}:0.5", *options]) == 0
    entry = read_recipe(out)["adapters"][0]
    assert (entry["name"], entry["strength"]) == ("a", 0.5)
    assert run_command_line(["replay", str(out), "--adapters", str(tmp_path)]) == 0
    assert run_command_line(["replay", str(out)]) == 2
    assert "made with the adapter 'a'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("to", "names", "error", "message"),
    [
        ("x" * 300 + ".safetensors", "kohya", ValueError, "file name of at most"),
        ("folder", "kohya", IsADirectoryError, "folder' is a folder"),
        ("file/new.safetensors", "kohya", OSError, "cannot be written"),
        ("file", "peft", NotADirectoryError, "file' is a file"),
        ("new.safetensors", "kohia", ValueError, "names 'kohia'"),
    ],
)
def test_the_target_is_checked_before_the_work(
    to: str, names: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    for work in ("load", "read_adapter"):
        monkeypatch.setattr(f"ldm.registry.adapting.{work}", fail)
    place: dict[str, Any] = {"to": tmp_path / to, "names": names}
    for act in (
        lambda: convert_adapter("a", **place),
        lambda: resize_adapter("a", **place, rank=2),
        lambda: merge_adapters([("a", 1.0)], **place),
        lambda: extract_adapter("a", "b", **place),
    ):
        with pytest.raises(error, match=message):
            act()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
