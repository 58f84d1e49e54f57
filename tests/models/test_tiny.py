"""The tiny autoencoder: parity with the peer at full size, and errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny as Peer
from shared_weights import TOLERANCE, VISIBLE, error, twins

from ldm.models.tiny import AutoencoderTiny, TinyConfig


def test_it_equals_the_peers_at_full_size():
    generator = torch.Generator().manual_seed(1)
    x, z = (
        torch.rand(2, 3, 64, 48, generator=generator) * 2 - 1,
        3 * torch.randn(2, 4, 8, 12, generator=generator),
    )
    with twins(Peer, lambda: AutoencoderTiny(TinyConfig())) as (theirs, ours):
        latents, images = theirs.encode(x).latents, theirs.decode(z).sample
        latent = ours.encode(x)
        assert error(latent.mean, latents) < TOLERANCE and torch.equal(
            latent.sample(torch.randn(2)), latent.mode()
        )
        assert error(ours.decode(z), images) < TOLERANCE
        first, second = ours.decoder.layers[2].conv[0], ours.decoder.layers[2].conv[2]
        first.weight, second.weight = second.weight, first.weight
        assert error(ours.decode(z), images) > VISIBLE


@torch.no_grad()
def test_large_latents_are_limited():
    model = AutoencoderTiny(TinyConfig(width=8, encoder=(1, 1), decoder=(1, 1)))
    z = torch.randn(1, 4, 3, 3)
    assert torch.equal(model.decode(z.sign() * 1e3), model.decode(z.sign() * 1e4))
    assert not torch.equal(model.decode(z), model.decode(2 * z))


def test_invalid_sizes_and_configurations_are_refused():
    model = AutoencoderTiny(TinyConfig(width=8, encoder=(1, 1, 1), decoder=(1, 1, 1)))
    assert model.config.factor == 4
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.zeros(1, 3, 14, 16))
    for wrong, message in (
        ({"encoder": ()}, "encoder and decoder"),
        ({"encoder": (1,)}, "as many numbers"),
        ({"width": 0}, "width"),
    ):
        with pytest.raises(ValueError, match=message):
            TinyConfig(**wrong)
