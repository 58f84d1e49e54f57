"""The optimizers: Muon's update in closed form, AdamW's as PyTorch computes it, and exact resumption."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ldm.models.dit import DiT, DiTConfig
from ldm.training.config import OptimizerConfig
from ldm.training.optimizers import Muon, hidden_matrices, make_optimizer, orthogonalized


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))


def backward(net: nn.Module, seed: int = 0) -> None:
    net.zero_grad()
    net(torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_orthogonalized_matrices_have_singular_values_near_one_and_the_same_singular_vectors(
    dtype, tolerance
):
    g = torch.Generator().manual_seed(0)
    for shape in ((6, 20), (20, 6), (8, 8)):
        x = torch.randn(shape, generator=g)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        made = orthogonalized(x, dtype=dtype)
        assert made.dtype == x.dtype
        inner = u.T @ made @ v.T
        off = inner - torch.diag(inner.diagonal())
        assert off.abs().max() < tolerance
        assert 0.65 < float(inner.diagonal().min()) and float(inner.diagonal().max()) < 1.25


def test_a_matrix_moves_by_the_orthogonalized_nesterov_momentum():
    net = small_net()
    weight, before = net[2].weight, net[2].weight.detach().clone()
    optimizer = Muon([weight], [], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    backward(net)
    grad = weight.grad.clone()
    optimizer.step()
    momentum = 0.05 * grad
    expected = before * (1 - 0.1 * 0.5)
    expected -= 0.1 * 0.2 * 12**0.5 * orthogonalized(0.05 * grad + 0.95 * momentum)
    assert torch.allclose(weight, expected, atol=1e-6)


def test_other_parameters_move_as_adamw_moves_them():
    net, peer = small_net(), small_net()
    own = Muon([], list(net.parameters()), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    theirs = torch.optim.AdamW(peer.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for k in range(4):
        for model, optimizer in ((net, own), (peer, theirs)):
            backward(model, k)
            optimizer.step()
    for a, b in zip(net.parameters(), peer.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_muon_equals_pytorchs_for_matrices_in_bfloat16():
    ours, theirs = (nn.Linear(12, 7, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    own = Muon([ours.weight], [], lr=0.02, betas=(0.9, 0.99), weight_decay=0.1, dtype=torch.bfloat16)
    peer = torch.optim.Muon(
        theirs.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(20, 12, generator=g)
        for net, optimizer in ((ours, own), (theirs, peer)):
            net.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=2e-3)  # iterations in bfloat16 round apart


def test_hidden_matrices_are_those_between_the_ends():
    config = DiTConfig(in_channels=1, out_channels=1, width=8, depth=1, head_dim=4, context_dim=4)
    assert hidden_matrices(DiT(config)) == {
        f"blocks.0.{name}.weight"
        for name in (
            *(f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
            "mlp.c_fc",
            "mlp.c_proj",
        )
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_optimizer_continues_bit_identically(kind: str):
    config = OptimizerConfig(kind=kind, lr=0.01)
    net = small_net()
    optimizer = make_optimizer(net, config)
    for k in range(3):
        backward(net, k)
        optimizer.step()
    other = copy.deepcopy(net)
    resumed = make_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, steps in ((net, optimizer), (other, resumed)):
        backward(model, 7)
        steps.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_muon_lowers_a_loss():
    net = small_net()
    optimizer = make_optimizer(net, OptimizerConfig(kind="muon", lr=0.02, weight_decay=0.0))
    x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    y = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(60):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"matrices: expected two or more dimensions, got \(3,\)"):
        Muon([nn.Parameter(torch.ones(3))], [], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    net = small_net()
    with pytest.raises(ValueError, match="closure: expected None"):
        make_optimizer(net, OptimizerConfig(kind="muon", lr=0.1)).step(lambda: None)


def test_the_rate_rises_stays_and_falls():
    line = OptimizerConfig(lr=2.0, warmup=4, decay=10, final=0.1)
    assert [line.rate(step, 30) for step in (0, 1, 3, 10, 20)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert line.rate(25, 30) == pytest.approx(2 * 0.55) and line.rate(29, 30) == pytest.approx(2 * 0.19)
    wave = OptimizerConfig(lr=2.0, warmup=4, decay=10, final=0.1, shape="cosine")
    assert wave.rate(20, 30) == 2.0 and wave.rate(25, 30) == pytest.approx(2 * 0.55)
    assert wave.rate(22, 30) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.2)) / 2))
