"""The vector-quantized autoencoder: nearest codes, parity with the peer, and errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import VQModel as Peer
from shared_weights import TOLERANCE, VISIBLE, error, rotate_qkv, twins

from ldm.models.vq import Codebook, VQConfig, VQModel

SMALL = {"channels": (32, 64), "blocks": 1, "latent_channels": 3, "attention_levels": (1,), "codes": 50}


def test_the_nearest_code_is_the_one_a_search_finds():
    torch.manual_seed(0)
    codebook = Codebook(20, 3)
    torch.nn.init.normal_(codebook.embedding.weight)
    z = torch.randn(2, 3, 4, 5)
    found = codebook.nearest(z)
    assert found.shape == (2, 4, 5)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
        assert int(found[b, i, j]) == int((codebook.embedding.weight - z[b, :, i, j]).norm(dim=1).argmin())


def test_codes_are_their_own_nearest():
    """This holds for positions in several parts, and in half precision."""
    codebook = Codebook(300, 4)
    torch.nn.init.normal_(codebook.embedding.weight, generator=torch.Generator().manual_seed(0))
    indices = torch.randint(0, 300, (2, 70, 80), generator=torch.Generator().manual_seed(1))
    assert torch.equal(codebook.nearest(codebook.vectors(indices)), indices)
    half = codebook.bfloat16()
    assert torch.equal(half.nearest(half.vectors(indices)), indices)


@pytest.mark.parametrize("mid", [True, False])
def test_small_models_equal_the_peers(mid):
    def peer() -> Peer:
        return Peer(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            layers_per_block=1,
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=3,
            num_vq_embeddings=50,
            mid_block_add_attention=mid,
        )

    generator = torch.Generator().manual_seed(1)
    x, z = torch.rand(2, 3, 16, 32, generator=generator) * 2 - 1, torch.randn(2, 3, 6, 8, generator=generator)
    with twins(peer, lambda: VQModel(VQConfig(**SMALL, mid_attention=mid))) as (theirs, ours):
        assert error(ours.encode(x).mean, theirs.encode(x).latents) < TOLERANCE
        images = theirs.decode(z).sample
        assert error(ours.decode(z), images) < TOLERANCE
        unquantized = theirs.decode(z, force_not_quantize=True).sample
        assert error(ours.decode(z), unquantized) > VISIBLE  # the codes matter
        rotate_qkv(ours, "decoder.up_blocks.0.attentions.0")
        assert error(ours.decode(z), images) > VISIBLE


@torch.no_grad()
def test_latents_are_continuous_and_decoding_quantizes_them():
    torch.manual_seed(0)
    model = VQModel(VQConfig(**SMALL)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    latent = model.encode(torch.rand(1, 3, 16, 16) * 2 - 1)
    z = latent.mode()
    assert z.shape == (1, 3, 8, 8) and torch.equal(latent.sample(torch.randn_like(z)), z)
    indices = model.indices(z)
    quantized = model.quantize.vectors(indices)
    assert not torch.allclose(quantized, z, atol=1e-2)
    assert torch.equal(model.decode(z), model.decode(quantized)) and torch.equal(
        model.decode(z), model.decode_indices(indices)
    )


def test_invalid_sizes_and_configurations_are_refused():
    with pytest.raises(ValueError, match="codes: expected at least 1"):
        VQConfig(codes=0)
    with pytest.raises(ValueError, match="multiples of 2"):
        VQModel(VQConfig(**SMALL)).encode(torch.zeros(1, 3, 15, 16))
