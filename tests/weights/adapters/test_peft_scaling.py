"""(IA)³ as peft trains and saves it: factors of outputs, with the bias, and of inputs."""

from __future__ import annotations

import copy
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
from ldm.weights.adapters.kinds.scaling import peft_factors
from ldm.weights.formats.safetensors import write_safetensors

BAR = 1e-5  # of the RMS
TARGETS = ["attn2.to_k", "attn2.to_v", "attn1.to_out.0", "ff.net.2"]  # the last two have a bias


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    name = register("sd-v1-5", tmp_path_factory.mktemp("sd")).name
    return ldm.load(name, weights="random", device="cpu", dtype="float32")


def with_factors(net: Any, strength: float = 1.0) -> Any:
    """Return a copy of a network in which peft scales some layers by 1 + s·v, for random v."""
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=["ff.net.2"])
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(net))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "ia3_l" in name:
                p.copy_(1 + strength * 0.5 * torch.randn(p.shape, generator=g))
    return theirs


@pytest.fixture(scope="module")
def file(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = peft.get_peft_model_state_dict(with_factors(pipe.denoiser.net))
    path = tmp_path_factory.mktemp("ia3") / "factors.safetensors"
    write_safetensors(path, {f"base_model.model.{name}": x.detach() for name, x in state.items()})
    return path


def output(net: Any, pipe: Any) -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net(x, torch.tensor([400.0]), pipe.text(["a cat"]))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.6, 0.0, -0.5])
def test_a_file_scales_as_peft_does(pipe: Any, file: Path, strength: float, merge: bool) -> None:
    before, plain = weights_of(pipe), output(pipe.denoiser.net, pipe)
    wanted = output(with_factors(pipe.denoiser.net, strength), pipe)
    loaded = pipe.adapters.load(file, strength=strength, merge=merge)
    found = output(pipe.denoiser.net, pipe)
    pipe.adapters.remove("factors")
    assert (found - wanted).square().mean().sqrt() < BAR * wanted.square().mean().sqrt()
    assert set(loaded.adapter.kinds) == {"(IA)³"} and not loaded.adapter.unused
    if strength:
        assert (plain - wanted).square().mean().sqrt() > 1e-3 * wanted.square().mean().sqrt()
    assert same_bits(pipe, before)


def test_what_other_names_cannot_express_is_refused(pipe: Any, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(IA\)³ of peft scales biases"):
        convert_adapter(file, tmp_path / "kohya.safetensors", model=pipe.name)


def test_factors_of_a_convolution_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ia3_l has the shape \(1, 8, 1, 1\), expected"):
        peft_factors(torch.ones(1, 8, 1, 1))
