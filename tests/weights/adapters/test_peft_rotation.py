"""OFT as peft trains and saves it: blocks of inputs, by a series or exactly, one for all or one each."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import same_bits, weights_of
from reduced_families import register
from torch import Tensor

import ldm
from ldm.registry.adapting import convert_adapter
from ldm.weights.adapters.kinds.input_rotation import InputRotation
from ldm.weights.formats.safetensors import write_safetensors

BAR = 1e-5  # of the RMS
SHAPES: dict[str, dict[str, Any]] = {
    "series": {},
    "exact": {"use_cayley_neumann": False},
    "shared": {"block_share": True, "use_cayley_neumann": False},
    **{f"{n} terms": {"num_cayley_neumann_terms": n} for n in (1, 2, 3, 4, 6, 7)},
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    name = register("sd-v1-5", tmp_path_factory.mktemp("sd")).name
    return ldm.load(name, weights="random", device="cpu", dtype="float32")


def rotated(net: Any, shape: dict[str, Any]) -> tuple[Any, peft.OFTConfig]:
    """Return a copy of a network in which peft rotates inputs at random, and the configuration."""
    targets = ["attn2.to_q", "attn1.to_out.0", "ff.net.2"]
    config = peft.OFTConfig(oft_block_size=8, target_modules=targets, **shape)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(net))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "oft_R" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return theirs, config


def written(theirs: Any, config: peft.OFTConfig, folder: Path) -> Path:
    """Write a folder as peft does."""
    state = peft.get_peft_model_state_dict(theirs)
    tensors = {f"base_model.model.{name}": x.detach().clone() for name, x in state.items()}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    stated = {**config.to_dict(), "target_modules": sorted(config.target_modules)}
    (folder / "adapter_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return folder


def output(net: Any, pipe: Any) -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net(x, torch.tensor([400.0]), pipe.text(["a cat"]))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_rotates_as_peft_does(pipe: Any, tmp_path: Path, shape: str, merge: bool) -> None:
    before, plain = weights_of(pipe), output(pipe.denoiser.net, pipe)
    theirs, config = rotated(pipe.denoiser.net, SHAPES[shape])
    wanted = output(theirs, pipe)
    folder = written(theirs, config, tmp_path)
    loaded = pipe.adapters.load(folder, name="turns", merge=merge)
    found = output(pipe.denoiser.net, pipe)
    pipe.adapters.set("turns", 0.0)
    none = output(pipe.denoiser.net, pipe)
    pipe.adapters.remove("turns")
    assert (found - wanted).square().mean().sqrt() < BAR * wanted.square().mean().sqrt()
    assert set(loaded.adapter.kinds) == {"OFT of inputs"} and not loaded.adapter.unused
    assert torch.equal(none, plain) and same_bits(pipe, before)
    if shape != "1 terms":  # which is the identity
        assert (plain - wanted).square().mean().sqrt() > 1e-3 * wanted.square().mean().sqrt()
    with pytest.raises(ValueError, match="OFT of peft rotates inputs"):
        convert_adapter(folder, tmp_path / "kohya.safetensors", model=pipe.name)


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
def test_a_strength_blends_with_the_identity(strength: float) -> None:
    g = torch.Generator().manual_seed(0)
    weight, values = torch.randn(6, 8, generator=g), 0.3 * torch.randn(2, 6, generator=g)
    delta = InputRotation(values=values, terms=None)
    whole = delta.apply(weight.clone(), 1.0)
    assert torch.allclose(whole.norm(dim=1), weight.norm(dim=1))  # a rotation
    blended = weight + strength * (whole - weight)
    assert torch.allclose(delta.apply(weight.clone(), strength), blended, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "shape"), [((2, 6), (6, 12)), ((2, 5), (6, 8)), ((6,), (6, 4)), ((9, 6), (6, 4, 3, 3))]
)
def test_values_of_another_layer_are_refused(values: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert "it rotates inputs" in InputRotation(values=torch.zeros(values)).misfit(shape)


def test_impossible_numbers_of_terms_are_refused(pipe: Any, tmp_path: Path) -> None:
    folder = written(*rotated(pipe.denoiser.net, {}), tmp_path)
    path = folder / "adapter_config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stated | {"num_cayley_neumann_terms": 10**9}), encoding="utf-8")
    with pytest.raises(ValueError, match="num_cayley_neumann_terms: expected 1 to 64"):
        pipe.adapters.load(folder, name="turns")
