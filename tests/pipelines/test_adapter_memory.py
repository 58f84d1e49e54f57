"""Loading, setting and removing an adapter many times: the same bits, and no more memory."""

from __future__ import annotations

import errno
import gc
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.models.unet import UNet, UNetConfig
from ldm.pipelines.adapters import Adapters
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import randomise

RANK = 16
TIMES = 20
NET = UNetConfig(channels=(128, 256), depth=(1, 1), blocks=1, heads=8, context_dim=256)


def lora(net: nn.Module) -> dict[str, Tensor]:
    """Return a random LoRA of all layers of the transformers."""
    state: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if ".attentions." in name and isinstance(module, nn.Linear | nn.Conv2d):
            out, inner, *kernel = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = torch.randn(RANK, inner, *kernel) * inner**-0.5
            state[f"unet.{name}.lora_B.weight"] = torch.randn(out, RANK, *kernel) * 0.02
    return state


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.view(torch.int32).clone() for name, value in net.state_dict().items()}


def tensor_bytes() -> int:
    """Return the bytes of all tensors that are alive, those of one storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if isinstance(each, Tensor) and not each.is_meta:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def resident() -> int:
    """Return the bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "on the fly"])
def test_twenty_times_restores_every_bit_and_takes_no_memory(tmp_path: Path, merge: bool) -> None:
    net = UNet(NET).requires_grad_(False)
    randomise(net, dtype=torch.float32)
    path = tmp_path / "lora.safetensors"
    write_safetensors(path, state := lora(net))
    size = sum(value.nbytes for value in state.values())
    del state
    adapters = Adapters(lambda: {"unet": net}, dict, "sd-v1-5")
    before = bits(net)

    def same() -> bool:
        return all(torch.equal(before[k], v.view(torch.int32)) for k, v in net.state_dict().items())

    def once(i: int) -> None:
        adapters.load(path, name="a", merge=merge)
        adapters.set("a", 0.1 * i - 0.75)
        assert same() != merge
        adapters.remove("a")

    for i in range(TIMES):  # the allocator's arenas grow at first, more so in a process of many tests
        once(i)
    tensors, grown = tensor_bytes(), []
    for _ in range(3):  # what is kept would grow each time, the allocator's pages do not
        memory = resident()
        for i in range(TIMES):
            once(i)
            assert same()
        grown.append(resident() - memory)
    assert tensor_bytes() == tensors
    assert min(grown) < TIMES * size / 20  # a twentieth of what twenty adapters would take
    assert size > 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="room is reserved on Linux alone")
def test_a_disk_without_room_for_the_originals_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    net = UNet(NET).requires_grad_(False)
    randomise(net, dtype=torch.float32)
    path, before = tmp_path / "lora.safetensors", bits(net)
    write_safetensors(path, lora(net))
    adapters = Adapters(lambda: {"unet": net}, dict, "a model")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="no space left"):
            adapters.load(path, name="style")
    assert not adapters.list()
    assert all(torch.equal(value, before[name]) for name, value in bits(net).items())
    adapters.load(path, name="style")
    assert not all(torch.equal(value, before[name]) for name, value in bits(net).items())
    adapters.remove("style")
    assert all(torch.equal(value, before[name]) for name, value in bits(net).items())
