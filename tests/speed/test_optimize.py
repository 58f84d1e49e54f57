"""`ldm.optimize` changes how networks compute, and not what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import BARS, UNETS, has_kernels, inputs, kept, make, rms
from tiny_latent_diffusion import tiny_model
from torch import nn

import ldm
from ldm.models.layers.attention import attention_control
from ldm.speed import fast_layers, packed
from ldm.speed.kernels.build import NoKernels
from ldm.speed.packed import ContextLinear, PackedConv2d


def without_kernels(monkeypatch):
    def unavailable():
        raise NoKernels("a test")

    monkeypatch.setattr(fast_layers, "CompiledOps", unavailable)


def winograd_of_small_maps(monkeypatch, used: bool = True):
    """Use Winograd's convolution for narrow and small maps too, or for none."""
    monkeypatch.setattr(packed, "WIDE", 16)
    monkeypatch.setattr(packed, "POSITIONS", 1 if used else 2**40)


@torch.no_grad()
@pytest.mark.parametrize(("kernels", "winograd"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_computes_the_same(monkeypatch, name, kernels, winograd):
    winograd_of_small_maps(monkeypatch, winograd)
    config = UNETS[name]
    plain = make(config)
    x, t, cond = inputs(config, torch.float32)
    expected = plain(x, t, cond)
    fast = ldm.optimize(copy.deepcopy(plain), kernels=kernels)
    assert rms(fast(x, t, cond), expected) < BARS[torch.float32]
    half = ldm.optimize(copy.deepcopy(plain).to(torch.bfloat16), kernels=kernels)
    went = [part for part in fast.modules() if isinstance(part, PackedConv2d) and kept(part, "transformed")]
    assert bool(went) == (kernels and winograd and has_kernels())
    assert half is ldm.optimize(half)  # a second call changes nothing
    own = rms(copy.deepcopy(plain).to(torch.bfloat16)(*inputs(config, torch.bfloat16)), expected)
    assert rms(half(*inputs(config, torch.bfloat16)), expected) < max(
        BARS[torch.bfloat16], 1.2 * own
    )  # no more than the error of bfloat16 itself


@torch.no_grad()
@pytest.mark.parametrize("winograd", [False, True])
def test_an_optimized_network_is_saved_loaded_copied_and_moved_as_before(monkeypatch, winograd):
    winograd_of_small_maps(monkeypatch, winograd)
    plain = make(UNETS["sd"])
    fast = ldm.optimize(copy.deepcopy(plain))
    args = inputs(UNETS["sd"], torch.float32)
    expected = fast(*args)
    assert isinstance(fast.conv_in, PackedConv2d) and kept(fast.conv_in, "packed")
    assert any(isinstance(part, PackedConv2d) and kept(part, "transformed") for part in fast.modules()) == (
        winograd and has_kernels()
    )
    state = fast.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(copy.deepcopy(fast)(*args), expected)
    assert torch.equal(fast.double().float()(*args), expected)
    other = {key: 0.5 * value for key, value in state.items()}
    fast.load_state_dict(other)
    plain.load_state_dict(other)
    assert rms(fast(*args), plain(*args)) < 1e-5


@torch.no_grad()
def test_circular_padding_is_kept(monkeypatch):
    winograd_of_small_maps(monkeypatch)
    conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular").requires_grad_(False)
    x = torch.randn(1, 16, 9, 8)
    assert rms(ldm.optimize(nn.Sequential(copy.deepcopy(conv)))(x), conv(x)) < 1e-5


def test_gradients_are_the_same():
    plain = make(UNETS["sd"])
    fast = ldm.optimize(copy.deepcopy(plain))
    x, t, cond = inputs(UNETS["sd"], torch.float32)
    with torch.no_grad():
        fast(x, t, cond)  # packs the weights
    slopes = []
    for net in (plain, fast):
        y = x.clone().requires_grad_()
        net(y, t, cond).square().sum().backward()
        slopes.append(y.grad)
    assert rms(slopes[1], slopes[0]) < 1e-5


@pytest.mark.parametrize("kernels", [True, False])
def test_training_is_the_same_with_evaluations_in_between(kernels):
    plain = make(UNETS["linear"]).requires_grad_(True)
    fast = ldm.optimize(copy.deepcopy(plain), kernels=kernels)
    args = inputs(UNETS["linear"], torch.float32)
    looks = []
    for net in (plain, fast):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(3):
            with torch.no_grad():
                looks.append(net(*args))
            net(*args).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert looks[2].square().mean() < 0.9 * looks[0].square().mean()  # the loss falls
    for expected, got in zip(looks[:3], looks[3:], strict=True):
        assert rms(got, expected) < 2e-5  # rounding of three steps


@torch.no_grad()
def test_attention_probabilities_can_still_be_read():
    fast = ldm.optimize(make(UNETS["sd"]))
    args = inputs(UNETS["sd"], torch.float32)
    expected, seen = fast(*args), []
    with attention_control(fast, lambda name, p: seen.append(p.sum(-1)) or None):
        assert rms(fast(*args), expected) < 1e-5
    assert len(seen) == 7 and all(torch.allclose(s, torch.ones(()), atol=1e-5) for s in seen)


@torch.no_grad()
def test_keys_and_values_are_computed_once_for_a_context(monkeypatch):
    layer = nn.Linear(24, 8).requires_grad_(False)
    layer.__class__ = ContextLinear
    context = torch.randn(2, 7, 24)
    first = layer(context)
    assert layer(context) is first
    context.mul_(2)  # the same tensor with other values
    assert not torch.equal(layer(context), first)
    assert layer(context.clone()) is not layer(context)


@torch.no_grad()
def test_guidance_gives_the_network_the_same_context_at_every_step():
    pipe, seen = tiny_model(), []
    pipe.denoiser.net.register_forward_pre_hook(lambda module, args: seen.append(args[2].context))
    pipe.text_to_image("a red cat", steps=3, progress=False)
    assert len(seen) == 3 and all(context is seen[0] for context in seen)


def test_a_pipeline_describes_what_was_done(monkeypatch):
    pipe = tiny_model().requires_grad_(False)
    whole = pipe.text_to_image("a red cat", steps=2, progress=False).tensor
    assert ldm.optimize(pipe) is pipe
    assert any("packed" in line for line in pipe.optimizations)
    assert (pipe.text_to_image("a red cat", steps=2, progress=False).tensor - whole).abs().max() < 1e-4
    without_kernels(monkeypatch)
    assert (
        "PyTorch's operators, as kernels cannot be built (a test)"
        in ldm.optimize(tiny_model()).optimizations[0]
    )
    assert "kernels=False" in ldm.optimize(tiny_model(), kernels=False).optimizations[0]
    assert any("strips" in line for line in ldm.optimize(tiny_model()).optimizations)
    spared = ldm.optimize(tiny_model(), memory=True).optimizations
    assert any("in a file" in line for line in spared)
    assert not any("folded" in line for line in spared)  # folded weights take 16/9 of the memory
