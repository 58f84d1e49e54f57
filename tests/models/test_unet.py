"""The UNet: published counts, parity with the peer, conditions, and errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel as Peer

from ldm.diffusion.cond import Cond
from ldm.models.unet import UNet, UNetConfig


def on_meta(**config) -> UNet:
    with torch.device("meta"):
        return UNet(UNetConfig(**config))


SD2 = {"heads": (5, 10, 20, 20), "context_dim": 1024, "linear_projection": True}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({}, 859_520_964),
        ({"in_channels": 9}, 859_535_364),
        (SD2, 865_910_724),
        ({"context_dim": 1280, "depth": (1, 1, 1, 0)}, 872_300_484),
    ],
)
def test_parameters_are_those_of_the_published_models(config, parameters):
    assert sum(p.numel() for p in on_meta(**config).parameters()) == parameters


def randomize(module: torch.nn.Module) -> None:
    """Add random numbers to all weights, because layers that start at zero would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data.add_(0.02 * torch.randn(p.shape, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
def test_a_small_unet_equals_the_peers(linear):
    torch.manual_seed(0)
    theirs = Peer(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=(4, 4, 4),
        use_linear_projection=linear,
    ).eval()
    randomize(theirs)
    ours = on_meta(
        channels=(32, 64, 64), depth=(0, 1, 1), heads=4, context_dim=24, linear_projection=linear
    ).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    # sizes that are rounded on the way down
    x, t, context = (torch.randn(2, 4, 15, 10), torch.tensor([3.0, 977.0]), torch.randn(2, 7, 24))
    expected = theirs(x, t, context).sample
    # the same operations in another order, in float32
    assert torch.allclose(ours(x, t, Cond(context=context)), expected, atol=1e-4 * float(expected.std()))
    permuted = ours(x, t, Cond(context=context.flip(-1)))
    assert not torch.allclose(permuted, expected, atol=1e-2 * float(expected.std()))


@torch.no_grad()
def test_masked_padding_does_not_change_the_result():
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=(16, 32), depth=(1, 1), blocks=1, heads=2, context_dim=8))
    x, t, context = torch.randn(2, 4, 8, 8), torch.full((2,), 10.0), torch.randn(2, 5, 8)
    padded = torch.cat([context, torch.randn(2, 3, 8)], dim=1)
    mask = (torch.arange(8) < 5).expand(2, 8)
    assert torch.allclose(
        net(x, t, Cond(context=padded, context_mask=mask)), net(x, t, Cond(context=context)), atol=1e-5
    )
    assert not torch.allclose(net(x, t, Cond(context=padded)), net(x, t, Cond(context=context)), atol=1e-4)


def test_gradients_equal_those_of_the_fused_attention():
    from ldm.models.layers.attention import attend

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 1, 5) > 0.3
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(attend(q, k, v, mask), expected)
    with torch.no_grad():
        assert torch.allclose(attend(q, k, v, mask), expected)
    ours = torch.autograd.grad(attend(q, k, v, mask).square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_invalid_inputs_and_configurations_are_refused():
    net = UNet(UNetConfig(channels=(8, 16), depth=(0, 1), blocks=1, heads=2, context_dim=8, pooled_dim=8))
    x, t, context = torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r"Cond\.pooled is None"):
        net(x, t, Cond(context=context))
    with pytest.raises(ValueError, match=r"Cond\.context is None"):
        net(x, t, Cond(pooled=torch.zeros(1, 8)))
    with pytest.raises(ValueError, match="input has 6 channels, this UNet takes 4"):
        net(x, t, Cond(context=context, pooled=torch.zeros(1, 8), concat=torch.zeros(1, 2, 8, 8)))
    for wrong, message in (
        ({"depth": (1,)}, "depth: expected 4"),
        ({"heads": None}, "one of heads and head_dim"),
        ({"heads": 7}, "cannot be split into 7 heads"),
        ({"channels": ()}, "channels"),
    ):
        with pytest.raises(ValueError, match=message):
            UNetConfig(**wrong)
