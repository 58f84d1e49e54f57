"""Derivatives through optimized layers, and copies of an optimized pipeline."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_networks import UNETS, inputs, make, rms
from tiny_latent_diffusion import tiny_model
from torch import nn

import ldm
from ldm.diffusion.cond import Cond
from ldm.models.unet_config import UNetConfig
from ldm.models.vae import VAEConfig

WITHOUT_ATTENTION = UNetConfig(
    channels=(32, 64), depth=(0, 0), mid_depth=0, blocks=1, heads=None, head_dim=8, context_dim=None
)
VAE = VAEConfig(channels=(16, 32), blocks=1)


def gradients(network: nn.Module, part: str, run) -> torch.Tensor:
    """Return all gradients of one part of a network, the only one that is trained."""
    network.requires_grad_(False)
    trained = network.get_submodule(part).requires_grad_(True)
    run(network).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in trained.parameters()])


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (UNETS["sd"], "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"),
        (UNETS["sd"], "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
        (UNETS["sd"], "up_blocks.0.upsamplers.0.conv"),
        (UNETS["sd"], "mid_block.resnets.0.norm1"),
        (UNETS["decoder"], "mid_block.attentions.0.to_v"),
        (VAE, "decoder.conv_in"),
        (VAE, "decoder.mid_block"),
        (VAE, "decoder.up_blocks.0.resnets.0.norm2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("memory", [False, True])
def test_one_part_of_a_network_can_be_trained(config, part, memory):
    plain = make(config)
    fast = ldm.optimize(copy.deepcopy(plain), memory=memory)
    if config is VAE:
        z = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
        run = lambda own: own.decode(z)  # noqa: E731
    else:
        run = lambda own: own(*inputs(config, torch.float32))  # noqa: E731
    with torch.no_grad():
        run(fast)
    got, expected = gradients(fast, part, run), gradients(plain, part, run)
    assert rms(got, expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"kernels": False}, {"memory": True}], ids=str)
def test_forward_derivatives_are_those_of_the_plain_network(options):
    """Without attention, whose product has no forward derivative in PyTorch."""
    plain = make(WITHOUT_ATTENTION)
    fast = ldm.optimize(copy.deepcopy(plain), **options)
    x, t, _ = inputs(UNETS["sd"], torch.float32)
    cond = Cond()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fast(x, t, cond)  # packs the weights
        for network in (plain, fast):
            value, slope = torch.func.jvp(lambda y, own=network: own(y, t, cond), (x,), (direction,))
            if network is plain:
                expected = value, slope
    assert rms(value, expected[0]) < 1e-5 and rms(slope, expected[1]) < 1e-5


def test_weights_that_are_computed_when_read_are_used():
    """A parametrized layer has no parameter called weight."""
    plain = make(UNETS["sd"])
    fast = ldm.optimize(copy.deepcopy(plain))

    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    with torch.no_grad():
        fast(*inputs(UNETS["sd"], torch.float32))
        for own in (plain, fast):
            for part in (own.conv_in, own.mid_block.attentions[0].transformer_blocks[0].attn2.to_k):
                nn.utils.parametrize.register_parametrization(part, "weight", Doubled())
        expected = plain(*inputs(UNETS["sd"], torch.float32))
        assert rms(fast(*inputs(UNETS["sd"], torch.float32)), expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"memory": True}, {"reuse": 2, "merge": 0.5}], ids=str)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_used_pipeline_is_independent(options, copied):
    """The file of memory=True belongs to the original: pages of a copy's weights must not be dropped."""
    pipe = ldm.optimize(tiny_model(), **options)

    def draw(own):
        return own.text_to_image("a red cat", steps=2, progress=False).tensor

    tolerance = 1e-4 if "memory" in options else 0.0  # the copy is not spilled, and doubling is folded again
    expected = draw(pipe)
    other = copied(pipe)
    state = {name: value.clone() for name, value in pipe.state_dict().items()}
    for _ in range(2):
        assert torch.allclose(draw(other), expected, atol=tolerance, rtol=0)
    with torch.no_grad():
        for p in pipe.parameters():
            p.mul_(1.5)
    assert torch.allclose(draw(other), expected, atol=tolerance, rtol=0)
    assert (draw(pipe) - expected).abs().max() > 0.01
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert torch.equal(draw(ldm.optimize(other, **options)), expected)
