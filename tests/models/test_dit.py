"""The diffusion transformer: shapes, invariants, conditions, and agreement with a plain formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from shared_weights import fill

from ldm.diffusion.cond import Cond
from ldm.models.dit import DiT, DiTConfig, NormedAttention, plane_sinusoid
from ldm.models.layers.attention import attention_control
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig

CONFIG = DiTConfig(in_channels=3, out_channels=3, width=16, depth=2, head_dim=8, context_dim=6)

SMALL = UNetConfig(channels=(32, 64), depth=(1, 0), heads=2, context_dim=6)


def make(config: DiTConfig = CONFIG) -> DiT:
    return fill(DiT(config))


def inputs(batch: int = 2, h: int = 4, w: int = 6) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    g = torch.Generator().manual_seed(1)
    context = torch.randn(batch, 5, 6, generator=g)
    return (
        torch.randn(batch, 3, h, w, generator=g),
        torch.rand(batch, generator=g) * 1000,
        Cond(context=context),
    )


def test_prediction_has_the_shape_of_the_latent_and_each_sample_is_its_own():
    net, (x, t, cond) = make(), inputs()
    out = net(x, t, cond)
    assert out.shape == x.shape
    for i in range(2):
        assert torch.allclose(net(x[i : i + 1], t[i : i + 1], cond[i : i + 1])[0], out[i], atol=1e-5)


@pytest.mark.parametrize("make_net", ["dit", "unet"])
def test_one_time_for_all_rows_is_embedded_once(make_net: str):
    """The number of rows of the embedding's products, on which their rounding depends, is then one."""
    net = make() if make_net == "dit" else fill(UNet(SMALL))
    x = torch.randn(3, net.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = Cond(context=torch.ones(3, 5, net.config.context_dim))
    rows: list[int] = []
    net.time_embedding.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    outs = [net(x, t, cond) for t in (torch.tensor(7.0).expand(3), torch.full((3,), 7.0))]
    assert rows == [1, 3] and torch.allclose(*outs, atol=1e-5)
    net(x, torch.tensor([7.0, 8.0, 9.0]), cond)
    assert rows[-1] == 3


def test_masked_tokens_do_not_matter_and_others_do():
    net, (x, t, cond) = make(), inputs()
    mask = torch.tensor([[True, True, False, True, False]] * 2)
    a = net(x, t, replace(cond, context_mask=mask))
    changed = cond.context.masked_fill(~mask[..., None], 7.0)
    assert torch.allclose(net(x, t, Cond(context=changed, context_mask=mask)), a, atol=1e-6)
    assert not torch.allclose(net(x, t, cond), a, atol=1e-3)


def test_plane_sinusoids_are_functions_of_the_fraction_of_height_and_width():
    found = plane_sinusoid(2, 4, 8)
    assert found.shape == (8, 8)
    for row in range(2):
        for column in range(4):
            y, x = math.pi * (row + 0.5) / 2, math.pi * (column + 0.5) / 4
            expected = [math.sin(y), math.sin(32 * y), math.cos(y), math.cos(32 * y)]
            expected += [math.sin(x), math.sin(32 * x), math.cos(x), math.cos(32 * x)]
            assert torch.allclose(found[4 * row + column], torch.tensor(expected), atol=1e-4)


def test_positions_are_told_apart():
    net, (_, t, cond) = make(), inputs()
    out = net(torch.ones(2, 3, 4, 4), t, cond)
    first, second = out[0, :, :2, :2], out[0, :, 2:, :2]
    assert not torch.allclose(first, second, atol=1e-3)


def test_normed_attention_is_attention_of_unit_vectors():
    layer = fill(NormedAttention(8, heads=2, head_dim=4))
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 5, 8, generator=g)
    q, k, v = (part(x).view(1, 5, 2, 4).transpose(1, 2) for part in (layer.to_q, layer.to_k, layer.to_v))
    unit = [p / p.square().mean(-1, keepdim=True).sqrt() for p in (q, k)]
    expected = F.scaled_dot_product_attention(*unit, v).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x), layer.to_out[0](expected), atol=1e-5)


def test_a_new_network_with_zero_gates_is_modulated_by_time_once_trained():
    net, (x, _, cond) = make(), inputs()
    early, late = (net(x, torch.full((2,), value), cond) for value in (10.0, 900.0))
    assert not torch.allclose(early, late, atol=1e-3)


def test_guidance_is_embedded_where_the_configuration_has_it():
    net, (x, t, cond) = make(replace(CONFIG, guidance_dim=8)), inputs()
    low, high = (net(x, t, replace(cond, guidance=torch.full((2,), scale))) for scale in (1.5, 6.0))
    assert not torch.allclose(low, high, atol=1e-4)
    with pytest.raises(ValueError, match="takes the guidance scale: Cond.guidance is None"):
        net(x, t, cond)
    with pytest.raises(ValueError, match="takes no guidance scale"):
        make()(x, t, replace(cond, guidance=torch.ones(2)))


def test_cross_attention_can_be_read_and_replaced():
    net, (x, t, cond) = make(), inputs()
    seen = {}
    with attention_control(net, seen.__setitem__) as names:
        plain = net(x, t, cond)
    assert names == ["blocks.0.attn2", "blocks.1.attn2"]
    assert all(p.shape == (2, 2, 6, 5) for p in seen.values())
    with attention_control(net, lambda _, p: torch.full_like(p, 0.2)):
        assert not torch.allclose(net(x, t, cond), plain, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 18}, "width 18: expected a multiple of 4 and of head_dim 8"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"patch": 0}, "patch: expected at least 1, got 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_inputs_that_do_not_fit_are_refused():
    net, (x, t, cond) = make(), inputs()
    for wrong, message in (
        ((x[:, :2], t, cond), "input has 2 channels, this DiT takes 3"),
        ((x[..., :3], t, cond), "input size 4×3: expected multiples of the patch 2"),
        ((x, t, Cond()), "attends to a context of width 6: Cond.context is None"),
        ((x, t, replace(cond, pooled=torch.ones(2, 3))), "takes no Cond.pooled"),
    ):
        with pytest.raises(ValueError, match=message):
            net(*wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    net, (x, t, cond) = make(), inputs()
    expected = net(x, t, cond)
    found = net.cuda()(x.cuda(), t.cuda(), cond.to("cuda")).cpu()
    assert torch.allclose(found, expected, atol=1e-4)
