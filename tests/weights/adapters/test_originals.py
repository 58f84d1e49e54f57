"""Originals of changed weights: mapped ones are read from their file again, others are written."""

from __future__ import annotations

import copy
import gc
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import in_memory
from torch import Tensor, nn

from ldm.models.unet import UNet, UNetConfig
from ldm.pipelines.adapters import Adapters
from ldm.support.memory import in_file, whole_pages
from ldm.weights.adapters.originals import Originals, _Mapped, _Written
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors
from ldm.weights.parts import build_network, fill_network, randomise
from ldm.weights.sources import mapped_source

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux states which pages are of a file")

NET = UNetConfig(channels=(64, 128), depth=(1, 1), blocks=1, heads=4, context_dim=64)


def loaded(folder: Path, file: torch.dtype, dtype: torch.dtype) -> nn.Module:
    """Return a UNet from a file of one dtype, in another."""
    path = folder / f"{file}.safetensors"
    if not path.exists():
        net = UNet(NET)
        randomise(net, dtype=file)
        write_safetensors(path, {key: value.contiguous() for key, value in net.state_dict().items()})
    made = build_network(NET)
    return fill_network(made, read_safetensors(path), "diffusers", source=path, dtype=dtype)


def lora(net: nn.Module, folder: Path) -> Path:
    """Write a random LoRA of all layers of the transformers."""
    state: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if ".attentions." in name and isinstance(module, nn.Linear | nn.Conv2d):
            out, inner, *kernel = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = torch.randn(4, inner, *kernel)
            state[f"unet.{name}.lora_B.weight"] = torch.randn(out, 4, *kernel)
    write_safetensors(folder / "lora.safetensors", state)
    return folder / "lora.safetensors"


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(net: nn.Module, wanted: dict[str, Tensor]) -> bool:
    """Return whether all bits of a network's tensors are those of others."""
    return all(
        value.dtype == wanted[name].dtype
        and torch.equal(value.contiguous().view(torch.uint8), wanted[name].view(torch.uint8))
        for name, value in net.state_dict().items()
    )


def close(net: nn.Module, other: nn.Module) -> bool:
    """Return whether two networks are equal up to rounding, which may differ with the place in memory."""
    wanted = other.state_dict()
    return all(
        torch.allclose(value, wanted[name], rtol=1e-2 if value.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
        for name, value in net.state_dict().items()
    )


def entries(adapters: Adapters) -> list[Any]:
    return list(adapters._merger._originals._entries.values())


CASES = [
    pytest.param(torch.float16, torch.float32, id="converted"),
    pytest.param(torch.float32, torch.float32, id="mapped"),
    pytest.param(torch.float32, torch.bfloat16, id="rounded"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="mapped in 16 bits"),
]


@pytest.mark.parametrize(("file", "dtype"), CASES)
def test_nothing_large_is_written_and_every_bit_comes_back(
    tmp_path: Path, file: torch.dtype, dtype: torch.dtype
) -> None:
    net, written = loaded(tmp_path, file, dtype), loaded(tmp_path, file, dtype)
    before, path = values(net), lora(net, tmp_path)
    for parameter in written.parameters():  # the same in memory of its own: its originals are written
        parameter.data = parameter.data.clone()
    adapters, others = (Adapters(lambda own=own: {"unet": own}, dict, "a model") for own in (net, written))
    others.load(path, name="a")
    for strength in (1.0, -0.5, 0.0):
        adapters.load(path, name="a", strength=strength)
        others.set("a", strength)
        assert close(net, written) and same(net, before) == (strength == 0)
        if strength:
            kept = entries(adapters)
            assert all(isinstance(each, _Mapped) for each in kept if each_size(each) > 3 * 4096)
            assert any(isinstance(each, _Mapped) for each in kept)
        adapters.set("a", 0.3)
        others.set("a", 0.3)
        assert close(net, written)
        adapters.remove("a")
        assert same(net, before) and not entries(adapters)
        again = loaded(tmp_path, file, dtype)
        assert same(again, before)  # the file was not written to


def each_size(entry: _Mapped | _Written) -> int:
    """Return the bytes of an original, of the smaller of its two dtypes."""
    if isinstance(entry, _Written):
        return entry.size // 2
    return min(entry.tensor.nbytes, entry.tensor.numel() * entry.dtype.itemsize)


@pytest.mark.parametrize(("file", "dtype"), CASES)
def test_weights_that_were_trained_since_are_written(
    tmp_path: Path, file: torch.dtype, dtype: torch.dtype
) -> None:
    net = loaded(tmp_path, file, dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.view(-1)[parameter.numel() // 2] += 1
    before = values(net)
    adapters = Adapters(lambda: {"unet": net}, dict, "a model")
    adapters.load(lora(net, tmp_path), name="a")
    assert all(isinstance(each, _Written) for each in entries(adapters))
    adapters.remove("a")
    assert same(net, before)


@pytest.mark.parametrize(("file", "dtype"), CASES)
def test_copies_and_conversions_restore_their_own(
    tmp_path: Path, file: torch.dtype, dtype: torch.dtype
) -> None:
    net = loaded(tmp_path, file, dtype)
    before = values(net)
    adapters = Adapters(lambda: {"unet": net}, dict, "a model")
    adapters.load(lora(net, tmp_path), name="a")
    merged = values(net)
    merger, other = copy.deepcopy((adapters._merger, net))
    adapters.remove("a")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert same(other, merged)
    merger.apply({"unet": other}, [])
    assert same(other, before)
    net = loaded(tmp_path, file, dtype)
    adapters = Adapters(lambda: {"unet": net}, dict, "a model")
    adapters.load(tmp_path / "lora.safetensors", name="a")
    net.to(torch.float16)
    adapters.remove("a")
    assert same(net, {name: value.to(torch.float16) for name, value in before.items()})


def test_what_is_read_to_restore_weights_leaves_memory(tmp_path: Path) -> None:
    net = loaded(tmp_path, torch.float16, torch.float32)
    adapters = Adapters(lambda: {"unet": net}, dict, "a model")
    adapters.load(lora(net, tmp_path), name="a")
    sources = [each.tensor for each in entries(adapters) if isinstance(each, _Mapped)]
    pages = sum(whole_pages(source)[1] for source in sources) // mmap.PAGESIZE
    adapters.remove("a")
    assert (
        pages > 20 and sum(map(in_memory, sources)) < pages / 5
    )  # the system maps neighbours of what is read


def test_sources_are_forgotten_with_their_parameters(tmp_path: Path) -> None:
    net = loaded(tmp_path, torch.float16, torch.float32)
    name, parameter = max(net.named_parameters(), key=lambda pair: pair[1].numel())
    source = mapped_source(parameter)
    assert source is not None and source.dtype == torch.float16
    assert in_file({name: source}) == [name]
    assert torch.equal(source.float(), parameter)
    assert mapped_source(nn.Parameter(parameter.detach().clone())) is None
    with torch.no_grad():
        parameter.view(-1)[-1] = -parameter.view(-1)[-1]
    assert mapped_source(parameter) is None
    from ldm.weights import sources

    count = len(sources._SOURCES)
    assert count
    del parameter, net
    gc.collect()
    assert len(sources._SOURCES) < count


def test_a_failed_write_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    originals = Originals()
    tensors = {("unet", str(i)): torch.ones(5000) + i for i in range(3)}
    monkeypatch.setattr(Originals, "_write_one", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        originals.keep(tensors)
    assert not len(originals)
