"""DALL·E's discrete autoencoder: size, parity with the published package, and its pixels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dalle_peers import dall_e
from tiny_dalle import tiny_dvae
from torch import nn

from ldm.catalog.lookup import find_card
from ldm.models.dalle.dvae import DVAE, DVAEConfig
from ldm.weights.parts import build_network


def peers(network: DVAE) -> tuple[nn.Module, nn.Module]:
    """Return the package's encoder and decoder with the weights of ours."""
    package, c = dall_e(), network.config
    sizes = {"n_hid": c.width, "n_blk_per_group": c.blocks, "vocab_size": c.codes}
    encoder, decoder = package.Encoder(**sizes), package.Decoder(**sizes, n_init=c.first)
    encoder.load_state_dict(network.encoder.state_dict())
    decoder.load_state_dict(network.decoder.state_dict())
    return encoder.eval(), decoder.eval()


def check_parity(network: DVAE, side: int) -> None:
    """Compare logits, tokens and pixels with the package's."""
    encoder, decoder = peers(network)
    package = dall_e()
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    logits = encoder(package.map_pixels(x))
    ours = network.encode(2 * x - 1).mode()
    rms = logits.square().mean().sqrt()
    assert (ours - logits).abs().max() < 1e-4 * rms
    tokens = network.indices(ours)
    assert torch.equal(tokens, logits.argmax(1))
    one_hot = torch.nn.functional.one_hot(tokens, network.config.codes).movedim(-1, 1).float()
    pixels = package.unmap_pixels(decoder(one_hot)[:, :3].sigmoid())
    assert (network.decode_indices(tokens) / 2 + 0.5 - pixels).abs().max() < 1e-4


def test_published_sizes() -> None:
    (config,) = find_card("dalle-dvae")[0].shapes().values()
    network = build_network(config)
    assert isinstance(network, DVAE)
    halves = [sum(p.numel() for p in half.parameters()) for half in (network.encoder, network.decoder)]
    assert halves == [53_786_240, 43_829_766]


@torch.no_grad()
def test_it_equals_the_published_package() -> None:
    check_parity(tiny_dvae(), 32)


@pytest.mark.slow
@torch.no_grad()
def test_it_equals_the_published_package_at_full_size() -> None:
    check_parity(tiny_dvae(DVAEConfig()), 64)


@torch.no_grad()
def test_shapes_and_ranges() -> None:
    network = tiny_dvae()
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    z = network.encode(x).mode()
    assert z.shape == (1, 512, 4, 6) and z.dtype == torch.float32
    pixels = network.decode(z)
    assert pixels.shape == x.shape and pixels.abs().max() <= 1
    with pytest.raises(ValueError, match="multiples of 8"):
        network.encode(x[..., :30])


@torch.no_grad()
def test_decoding_tokens_equals_decoding_a_one_hot_map() -> None:
    network = tiny_dvae()
    tokens = torch.arange(12).view(1, 3, 4)
    one_hot = torch.nn.functional.one_hot(tokens, 512).movedim(-1, 1).float()
    x = network.decoder(one_hot)[:, :3].sigmoid()
    expected = ((x - 0.1) / 0.8).clamp(0, 1) * 2 - 1
    assert torch.allclose(network.decode_indices(tokens), expected, atol=1e-5)


def test_wrong_sizes_are_refused() -> None:
    for make in (partial(DVAEConfig, width=30), partial(DVAEConfig, codes=0)):
        with pytest.raises(ValueError, match="expected"):
            make()
