"""The autoencoder: published counts, parity with the peer, shapes, and errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as Peer

from ldm.models.vae import AutoencoderKL, Posterior, VAEConfig, psnr


def on_meta(**config) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(VAEConfig(**config))


@pytest.mark.parametrize(
    ("config", "parameters", "keys"),
    [
        ({"channels": (128, 256, 512), "latent_channels": 3}, 55_312_063, 204),
        ({}, 83_653_863, 248),
        (
            {"channels": (128, 128, 256, 256, 512), "latent_channels": 16, "attention_levels": (4,)},
            69_610_963,
            342,
        ),
        (
            {"channels": (128, 128, 256, 256, 512, 512), "latent_channels": 64, "attention_levels": (4, 5)},
            103_880_131,
            436,
        ),
    ],
)
def test_parameters_are_those_of_the_published_models(config, parameters, keys):
    model = on_meta(**config)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == (parameters, keys)


def peer(**config) -> Peer:
    torch.manual_seed(0)
    levels = len(config["block_out_channels"])
    return Peer(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=32,
        **config,
    ).eval()


@torch.no_grad()
def test_encoder_and_decoder_equal_the_peers_at_full_size():
    theirs = peer(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    ours = on_meta().eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    # about 30 convolutions in float32 on both sides: a few hundred ulp
    assert torch.allclose(posterior.mean, expected.mean, atol=1e-4 * float(expected.mean.std()))
    assert torch.allclose(posterior.logvar, expected.logvar, atol=1e-4 * float(expected.logvar.std()))
    z = torch.randn(1, 4, 8, 12)
    assert torch.allclose(
        ours.decode(z), theirs.decode(z).sample, atol=1e-4 * float(theirs.decode(z).sample.std())
    )


@torch.no_grad()
def test_permuted_attention_weights_change_the_result():
    theirs = peer(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4)
    ours = on_meta(channels=(32, 64), blocks=1).eval()
    state = theirs.state_dict()
    to_q, to_k = "encoder.mid_block.attentions.0.to_q.weight", "encoder.mid_block.attentions.0.to_v.weight"
    state[to_q], state[to_k] = state[to_k], state[to_q]
    ours.load_state_dict(state, assign=True)
    x = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(ours.encode(x).mean, theirs.encode(x).latent_dist.mean, atol=1e-4)


def test_the_posterior_is_a_gaussian():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    posterior = Posterior(mean, logvar)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    assert torch.allclose(posterior.kl(), exact.flatten(1).sum(1), rtol=1e-5)
    assert torch.equal(posterior.sample(torch.zeros_like(mean)), posterior.mode())


def test_patches_change_the_factor_and_keep_the_size():
    model = AutoencoderKL(VAEConfig(channels=(8, 16), blocks=1, patch=2))
    assert model.config.factor == 4
    y, posterior = model(torch.zeros(1, 3, 16, 32), torch.zeros(1, 4, 4, 8))
    assert y.shape == (1, 3, 16, 32) and posterior.mean.shape == (1, 4, 4, 8)


def test_invalid_sizes_and_configurations_are_refused():
    model = AutoencoderKL(VAEConfig(channels=(8, 16), blocks=1))
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode(torch.zeros(1, 3, 15, 16))
    for wrong in ({"channels": ()}, {"blocks": 0}, {"patch": 0}, {"attention_levels": (4,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VAEConfig(**wrong)


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4)
    assert torch.allclose(
        psnr(a, a + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)), torch.tensor([20.0, 40.0]), atol=1e-3
    )
