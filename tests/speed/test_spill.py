"""Weights leave memory while their network is not in use, and results stay the same."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import UNETS, inputs, kept, make, rms
from tiny_latent_diffusion import tiny_model

import ldm


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True])
def test_memory_can_be_set_after_a_run_unset_and_used_with_conversions(before):
    """Weights that are not in the file any more must not be evicted."""
    plain = make(UNETS["sd"])
    args = inputs(UNETS["sd"], torch.float32)
    expected, fast = plain(*args), ldm.optimize(copy.deepcopy(plain))
    if before:
        fast(*args)  # packs the weights
    ldm.optimize(fast, memory=True)
    for _ in range(2):
        assert rms(fast(*args), expected) < 1e-5
    storage = fast.conv_in.spilled.storage
    assert fast.conv_in.weight.untyped_storage().data_ptr() == storage.data_ptr()
    fast.double().float()
    for _ in range(2):
        assert rms(fast(*args), expected) < 1e-5
    ldm.optimize(fast, memory=True)
    ldm.optimize(fast)
    assert (
        fast.conv_in.spilled is None
        and not fast._forward_hooks
        and not any("at rest" in line for line in fast.optimizations)
    )
    for _ in range(2):
        assert rms(fast(*args), expected) < 1e-5


def mapped(network):
    """Return the bytes of the process's memory that are pages of spilled weights."""
    lines, total, inside = open("/proc/self/smaps", encoding="utf-8").read().splitlines(), 0, False
    begin = network.storage.data_ptr()
    for line in lines:
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            low, high = (int(v, 16) for v in line.split()[0].split("-"))
            inside = low <= begin < high
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_full_disk_is_an_error_that_names_the_folder(monkeypatch, tmp_path):
    """A file without the space that it states would end the process at the first write."""

    def full(handle, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    net = make(UNETS["sd"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left on device \(\d+ bytes\): '.*/home/kernels'"):
            ldm.optimize(net, kernels=False, memory=True)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (tmp_path / "home" / "kernels").stat().st_mode & 0o777 == 0o700
    args = inputs(UNETS["sd"], torch.float32)
    expected = net(*args)
    assert rms(ldm.optimize(net, kernels=False, memory=True)(*args), expected) < 1e-5


def test_networks_take_turns_in_memory(monkeypatch, tmp_path):
    from ldm.speed import spill

    monkeypatch.setenv("LDM_HOME", str(tmp_path))
    pipe, other = tiny_model().requires_grad_(False), tiny_model()
    whole = pipe.text_to_image("a red cat", steps=2, progress=False).tensor
    state = other.state_dict()
    spilled = spill.take_turns(ldm.optimize(pipe).networks().values())
    assert not [path for path in (tmp_path / "kernels").iterdir() if path.suffix != ".so"]  # without a name
    assert all(torch.equal(value, state[key]) for key, value in pipe.state_dict().items())
    for own in spilled:
        own.rest()
    assert all(mapped(own) == 0 for own in spilled)
    unet = next(own for own in spilled if own.network is pipe.denoiser.net)
    begin, end = unet.storage.data_ptr(), unet.storage.data_ptr() + unet.storage.nbytes()
    assert all(
        (begin <= p.data_ptr() < end) == (p.dim() > 1) for p in unet.network.parameters()
    )  # norms in the file would keep the weights of their page in memory
    between = []
    for _ in range(2):
        made = pipe.text_to_image(
            "a red cat", steps=2, progress=False, on_step=lambda i, x, d: between.append(mapped(unet))
        )
        assert (made.tensor - whole).abs().max() < 1e-4
        assert between and not any(between)  # the weights are packed, and the plain ones have left memory
        assert kept(pipe.vae.decoder.conv_in, "packed") and not kept(
            pipe.denoiser.net.conv_in, "packed"
        )  # the last network that computed, and one at rest
        assert mapped(unet) == 0
