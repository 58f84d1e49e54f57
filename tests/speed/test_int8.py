"""Products in 8 bits: how much they change the result, and that they can be removed."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import UNETS, inputs, make, rms
from torch import nn

import ldm
from ldm.models.layers.transformer import GEGLU
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.speed.int8 import Int8, quantise


def test_quantization_rounds_to_half_a_step():
    for x in (torch.randn(3, 500), torch.rand(3, 500) + 1, -torch.rand(3, 500) - 1, torch.zeros(3, 4)):
        q, scale, zero = quantise(x.to(torch.bfloat16))
        assert q.dtype == torch.uint8 and 0 <= zero <= 255
        assert (scale * (q.float() - zero) - x.to(torch.bfloat16).float()).abs().max() <= 0.501 * scale + 1e-6
        assert (q[0] != q[1]).any() or not x.any()


def vnni():
    return torch.cpu._is_vnni_supported()


def rounded(w):
    """Return a weight rounded to 8 bits, in float64."""
    scale = w.double().flatten(1).abs().amax(1).view(-1, *[1] * (w.ndim - 1)) / 127
    return (w.double() / scale).round() * scale


@torch.no_grad()
@pytest.mark.skipif(not vnni(), reason="needs AVX-512 VNNI")
def test_a_layer_multiplies_the_quantized_numbers():
    torch.manual_seed(0)
    linear, conv, geglu = nn.Linear(64, 48), nn.Conv2d(32, 48, 3, stride=2, padding=1), GEGLU(64, 96)
    for layer, x in (
        (linear, torch.randn(2, 9, 64)),
        (conv, torch.randn(2, 32, 9, 7) - 0.5),
        (geglu, torch.randn(2, 9, 64) + 1),
    ):
        layer.requires_grad_(False)
        exact = layer(x)
        q, scale, zero = quantise(x)
        simulated = copy.deepcopy(layer).double()
        own = simulated.proj if layer is geglu else simulated
        own.weight.copy_(rounded(own.weight))
        expected = simulated(scale * (q.double() - zero))
        Int8(layer)
        assert rms(layer(x), expected) < 1e-5
        assert 1e-3 < rms(layer(x), exact) < 0.02


@torch.no_grad()
@pytest.mark.skipif(not vnni(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_in_8_bits_have_an_error_of_hundredths_and_can_be_removed(name, dtype):
    net = ldm.optimize(make(UNETS[name], dtype))
    args = inputs(UNETS[name], dtype)
    exact = net(*args)
    ldm.optimize(net, int8=True)
    assert 1e-3 < rms(net(*args), exact) < 0.1  # random weights; about 0.01 per layer
    state = net.state_dict()
    assert state.keys() == make(UNETS[name], dtype).state_dict().keys()
    twice = {key: 2 * value if key.endswith("conv2.weight") else value for key, value in state.items()}
    net.load_state_dict(twice)  # other weights are used
    other = net(*args)
    assert rms(other, exact) > 0.1
    assert torch.equal(copy.deepcopy(net)(*args), other)
    ldm.optimize(net)
    assert rms(other, net(*args)) < 0.1 and not any(
        isinstance(p.__dict__.get("forward"), Int8) for p in net.modules()
    )


@torch.no_grad()
def test_missing_8_bit_products_are_refused_and_gradients_use_the_plain_weights(monkeypatch):
    net = make(UNETS["sd"])
    x, t, cond = inputs(UNETS["sd"], torch.float32)
    if vnni():
        expected = net(x, t, cond)
        ldm.optimize(net, kernels=False, int8=True)
        with torch.enable_grad():
            assert rms(net(x.clone().requires_grad_(), t, cond).detach(), expected) < 1e-5
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    plain = make(UNETS["sd"])
    with pytest.raises(RuntimeError, match="AVX-512 VNNI"):
        ldm.optimize(plain, int8=True)
    assert type(plain.conv_in) is nn.Conv2d
    with pytest.raises(ValueError, match="act on a UNet"):
        ldm.optimize(AutoencoderKL(VAEConfig(channels=(16, 32), blocks=1)), int8=True)
