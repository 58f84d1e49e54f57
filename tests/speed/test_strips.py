"""Folded upsampling, and decoding by strips of rows, give the results of whole maps."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import BARS, make, rms

import ldm
from ldm.models.layers.resblock import Upsample
from ldm.models.vae import VAEConfig
from ldm.speed.folded import FoldedUpsample
from ldm.speed.strips import Map, StripDecoder


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 6), (1, 1), (8, 3)])
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_folded_upsampling_is_the_same_convolution(size, dtype):
    plain = Upsample(32).to(dtype).requires_grad_(False)
    folded = copy.deepcopy(plain)
    folded.__class__ = FoldedUpsample
    x = torch.randn(2, 32, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = copy.deepcopy(plain).double()(x.double())
    assert rms(folded(x), expected) < BARS[dtype] / 2
    odd = (2 * size[0] - 1, 2 * size[1])  # for an odd size that was halved
    assert torch.equal(folded(x, odd), plain(x, odd))
    folded.conv.weight.mul_(2), folded.conv.bias.mul_(2)
    folded.to(torch.float64).to(dtype)  # moving discards the folded weights
    assert rms(folded(x), 2 * expected) < BARS[dtype] / 2


@torch.no_grad()
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(channels=(16, 32, 32), blocks=1),
        VAEConfig(channels=(16, 32), blocks=1, attention_levels=(0,), patch=2),
    ],
    ids=["three", "two"],
)
def test_strips_have_no_seams(config, kernels, monkeypatch):
    from ldm.speed import strips

    plain = make(config)
    z = torch.randn(2, 4, 20, 13, generator=torch.Generator().manual_seed(0)) + 1
    expected = plain.decode(z)
    fast = ldm.optimize(copy.deepcopy(plain), kernels=kernels)
    assert isinstance(fast.decoder, StripDecoder)
    kept = []
    block = strips.res_block
    monkeypatch.setattr(
        strips,
        "res_block",
        lambda ops, own, source, inner: kept.append(inner is not None) or block(ops, own, source, inner),
    )
    # strips of eight rows; one strip; strips without whole doubled maps; and blocks that recompute the map
    # between their convolutions
    for strip, large, spare in (
        (1, 2**28, False),
        (2**25, 2**28, False),
        (1, 1, False),
        (1, 1, True),
        (2**12, 1, True),
    ):
        monkeypatch.setattr(strips, "STRIP", strip), monkeypatch.setattr(strips, "LARGE", large)
        fast.decoder.spare = spare
        kept.clear()
        assert rms(fast.decode(z), expected) < 1e-5
        assert set(kept) <= {not spare} and (kept or strip == 2**25)
    seen = []
    hook = (
        fast.decoder.up_blocks[-1].resnets[0].register_forward_hook(lambda block, x, y: seen.append(y.shape))
    )
    assert (
        rms(fast.decode(z), expected) < 1e-5 and len(seen) == 1
    )  # a hook on a layer is called with the whole map
    hook.remove()
    half = fast.to(torch.bfloat16)
    assert rms(half.decode(z.to(torch.bfloat16)), expected) < 2.5e-2
    assert (
        rms(
            fast.encode(expected.to(torch.bfloat16).clamp(-1, 1)).mean,
            plain.encode(expected.clamp(-1, 1)).mean,
        )
        < 2e-2
    )


def test_rows_of_a_doubled_map_are_those_of_the_whole():
    up = Upsample(4).requires_grad_(False)
    x = torch.randn(1, 4, 7, 5)
    whole = up(x)
    source = Map(x, up)
    assert (source.height, source.width) == (14, 10)
    for top, bottom in ((0, 14), (0, 3), (5, 6), (6, 11), (13, 14)):
        assert torch.allclose(source.rows(top, bottom), whole[:, :, top:bottom], atol=1e-5)
