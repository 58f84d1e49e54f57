"""`for_training` keeps the gradients of a network."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import BARS, UNETS, has_kernels, inputs, make, rms
from torch import nn

from ldm.models.layers.resblock import ResBlock
from ldm.models.unet_config import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.speed.fast_layers import exchange_back
from ldm.speed.optimization import for_training


def in_memory(x):
    return x.as_strided((x.numel(),), (1,))


@pytest.mark.parametrize(
    "config",
    [*UNETS.values(), VAEConfig(channels=(32, 64), blocks=1, latent_channels=4)],
    ids=[*UNETS, "vae"],
)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_a_network_made_for_training_has_the_same_gradients(config, dtype):
    """The error is relative to float64; under autocast the plain network's own error is up to 0.03."""
    if not has_kernels():
        pytest.skip("without kernels the network stays as it is")
    nets = {"exact": make(config, torch.float64), "plain": make(config)}
    nets["fast"] = for_training(copy.deepcopy(nets["plain"]))
    assert not any(type(part) in (nn.GroupNorm, ResBlock) for part in nets["fast"].modules())
    found = {}
    for who, net in nets.items():
        net.train().requires_grad_(True)
        own = torch.float64 if who == "exact" else torch.float32
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16 and who != "exact"):
            if isinstance(config, UNetConfig):
                x, t, cond = inputs(config, own)
                loss = net(x, t, cond).to(own).square().mean()
            else:
                loss = (
                    net.decode(
                        net.encode(torch.linspace(-1, 1, 3 * 32 * 24, dtype=own).view(1, 3, 32, 24)).mean.to(
                            own
                        )
                    )
                    .to(own)
                    .square()
                    .mean()
                )
        loss.backward()
        found[who] = torch.cat([p.grad.flatten() for p in net.parameters()])
        for p in net.parameters():  # the fused AdamW reads weights and gradients in the order of memory
            assert torch.equal(in_memory(p.grad), in_memory(torch.empty_like(p).copy_(p.grad)))
    fast, plain = (rms(found[who], found["exact"]) for who in ("fast", "plain"))
    assert fast < max(BARS[dtype], 1.2 * plain)


def test_a_network_made_for_training_can_be_exchanged_back():
    net = make(UNETS["sd"])
    kinds = [type(part) for part in net.modules()]
    exchange_back(for_training(net))
    assert [type(part) for part in net.modules()] == kinds and not any(
        hasattr(part, "ops") for part in net.modules()
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("of_input", [True, False])
def test_winograd_convolutions_have_the_gradients_of_convolutions(bias, of_input):
    if not has_kernels():
        pytest.skip("without kernels the network stays as it is")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(64, 80, 3, padding=1, bias=bias))
    exact, fast = copy.deepcopy(plain).double(), for_training(copy.deepcopy(plain))
    x, dy = torch.randn(4, 64, 7, 9), torch.randn(4, 80, 7, 9)
    found = []
    for net, dtype in ((exact, torch.float64), (fast, torch.float32)):
        own = x.to(dtype).requires_grad_(of_input)
        y = net(own)
        assert ("Winograd" in type(y.grad_fn).__name__) == (net is fast)
        tensors = [own, *net.parameters()] if of_input else [*net.parameters()]
        found.append([y.detach(), *torch.autograd.grad(y, tensors, dy.to(dtype))])
    assert all(rms(got, expected) < 3e-6 for expected, got in zip(*found, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert "Winograd" not in type(fast(x).grad_fn).__name__
