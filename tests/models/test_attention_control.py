"""Control of attention probabilities: reading changes nothing, replacing changes the product."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from ldm.diffusion.cond import Cond
from ldm.models.layers.attention import Attention, attention_control, probabilities
from ldm.models.unet import UNet, UNetConfig


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return UNet(UNetConfig(channels=(8, 16), depth=(0, 1), blocks=1, heads=2, context_dim=16)).eval()


@pytest.fixture(scope="module")
def call(net):
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        return lambda: net(x, torch.tensor([500.0, 500.0]), Cond(context=context, context_mask=mask))


@torch.no_grad()
@pytest.mark.parametrize("of", ["cross", "self", "all"])
def test_reading_is_bit_identical_and_rows_sum_to_one(net, call, of):
    plain, seen = call(), {}
    with attention_control(net, lambda name, p: seen.__setitem__(name, p), of=of) as names:
        assert torch.equal(call(), plain)
    assert sorted(seen) == sorted(names) and all(
        isinstance(net.get_submodule(name), Attention) for name in names
    )
    assert {name.rsplit(".", 1)[1] for name in names} == {
        "cross": {"attn2"},
        "self": {"attn1"},
        "all": {"attn1", "attn2"},
    }[of]
    for name, p in seen.items():
        assert p.shape == (2, 2, 16, 5 if name.endswith("attn2") else 16) and p.dtype == torch.float32
        assert (p.sum(-1) - 1).abs().max() < 1e-6  # float32 sums of 16
        if name.endswith("attn2"):
            assert (
                p[1, ..., 3:].abs().max() == 0 and p[0, ..., 3:].min() > 0
            )  # masked tokens have probability 0


@torch.no_grad()
def test_probabilities_replaced_by_themselves_give_the_same_within_rounding(net, call):
    plain = call()
    with attention_control(net, lambda name, p: p.clone(), of="all"):
        assert (call() - plain).abs().max() < 1e-5  # explicit product and fused kernel, both in float32


@torch.no_grad()
def test_replaced_probabilities_are_multiplied():
    torch.manual_seed(0)
    layer = Attention(16, heads=2, head_dim=8, context_dim=16)
    x, context = torch.randn(1, 4, 16), torch.randn(1, 3, 16)
    with attention_control(layer, lambda name, p: F.one_hot(torch.tensor(2), 3).float().expand_as(p)):
        got = layer(x, context)
    # every query attends only to the third token
    expected = layer.to_out[0](layer.to_v(context[:, 2:3])).expand_as(got)
    assert torch.allclose(got, expected, atol=1e-6) and not torch.allclose(
        layer(x, context), expected, atol=1e-2
    )


@torch.no_grad()
def test_controls_nest_and_are_removed(net, call):
    plain, seen = call(), []
    with (
        attention_control(net, lambda name, p: torch.full_like(p, 0.2)),
        attention_control(net, lambda name, p: seen.append(p)),
    ):
        assert (call() - plain).abs().max() > 1e-4
    assert all(bool((p == 0.2).all()) for p in seen) and seen
    with pytest.raises(ZeroDivisionError), attention_control(net, lambda name, p: 1 / 0):
        call()
    assert torch.equal(call(), plain) and all(
        part.controls == () for part in net.modules() if isinstance(part, Attention)
    )


def test_the_probabilities_are_softmax_of_the_scaled_products():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 3, 8)
    expected = (torch.einsum("bhld,bhmd->bhlm", q.double(), k.double()) / 8**0.5).softmax(-1)
    assert torch.allclose(probabilities(q, k).double(), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(probabilities(q, k).double(), expected, atol=1e-6)


def test_invalid_controls_are_refused(net, call):
    with (
        pytest.raises(ValueError, match="cross, self or all, got 'both'"),
        attention_control(net, lambda name, p: None, of="both"),
    ):
        pass
    plain = UNet(UNetConfig(channels=(8, 16), depth=(0, 0), mid_depth=0, blocks=1, heads=2, context_dim=None))
    with (
        pytest.raises(ValueError, match="no cross-attention"),
        attention_control(plain, lambda name, p: None),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"expected shape \(2, 2, 16, 5\)"),
        attention_control(net, lambda name, p: p[:1]),
    ):
        call()


@torch.no_grad()
def test_a_control_is_seen_by_its_own_thread_only(net, call):
    plain = call()
    with attention_control(net, lambda name, p: torch.full_like(p, 0.2)):
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(torch.no_grad()(call)).result()
        assert (call() - plain).abs().max() > 1e-4
    assert torch.equal(other, plain) and torch.equal(call(), plain)
