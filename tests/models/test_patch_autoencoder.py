"""The patch autoencoder: its projection is that of principal components, and its residual begins at zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from ldm.models.vae import psnr

CONFIG = PatchAutoencoderConfig(factor=4, latent_channels=6, channels=(8, 16))


def images(n: int = 24, side: int = 16) -> torch.Tensor:
    """Return smooth random images (n, 3, side, side) in [−1, 1]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)


def fitted(config: PatchAutoencoderConfig = CONFIG) -> PatchAutoencoder:
    torch.manual_seed(0)
    net = PatchAutoencoder(config)
    net.fit(images())
    return net


def test_the_projection_is_the_best_of_its_rank():
    net, x = fitted(), images()
    patches = F.pixel_unshuffle(x, 4).movedim(1, -1).flatten(0, -2)
    mean = patches.mean(0)
    _, _, basis = torch.linalg.svd(patches - mean, full_matrices=False)
    best = (patches - mean) @ basis[:6].T @ basis[:6] + mean
    made = F.pixel_unshuffle(net.decode(net.encode(x).mode()), 4).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(made, best, atol=1e-4)


def test_latents_are_uncorrelated_have_mean_square_one_and_standard_deviations_by_the_square_root():
    torch.manual_seed(0)
    net, x = PatchAutoencoder(CONFIG), images()
    deviations = net.fit(x)
    z = net.encode(x).mode().detach().movedim(1, -1).flatten(0, -2).double()
    assert abs(float(z.square().mean()) - 1) < 1e-4
    covariance = torch.cov(z.T, correction=0)
    assert torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=1e-4)
    assert torch.allclose(
        covariance.diagonal().sqrt(), (deviations / deviations.mean()).sqrt().double(), atol=1e-4
    )


def test_all_components_reconstruct_exactly():
    net, x = fitted(PatchAutoencoderConfig(factor=2, latent_channels=12, channels=(8,))), images()
    assert float(psnr(net.decode(net.encode(x).mode()), x).min()) > 80


def test_changes_of_an_image_act_linearly_on_its_latent():
    net, x = fitted(), images()
    a, b = x[:1], x[1:2]
    mixed = net.encode(0.25 * a + 0.75 * b).mode()
    assert torch.allclose(mixed, 0.25 * net.encode(a).mode() + 0.75 * net.encode(b).mode(), atol=1e-5)
    moved = net.encode(torch.roll(a, 4, dims=-1)).mode()
    assert torch.allclose(moved, torch.roll(net.encode(a).mode(), 1, dims=-1), atol=1e-6)


def test_the_residual_learns():
    net, x = fitted(), images()
    before = float(psnr(net.decode(net.encode(x).mode()), x).mean())
    optimizer = torch.optim.Adam(net.residual.parameters(), lr=3e-3)
    for _ in range(60):
        loss = (net.decode(net.encode(x).mode()) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(psnr(net.decode(net.encode(x).mode()), x).mean()) > before + 1


def test_the_posterior_has_the_stated_noise():
    net, x = fitted(), images()
    posterior = net.encode(x)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(posterior.sample(noise) - posterior.mean, 0.05 * noise, atol=1e-6)
    made, again = net(x, noise)
    assert made.shape == x.shape and torch.equal(again.mean, posterior.mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 49}, "latent_channels 49: expected at most 48"),
        ({"factor": 3}, "factor 3: expected a multiple of 2 for 2 levels"),
        ({"noise": 0.0}, "noise 0.0: expected a positive number"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        PatchAutoencoderConfig(**{"factor": 4, "latent_channels": 6, "channels": (8, 16), **change})


def test_images_that_do_not_determine_the_projection_are_refused():
    net = PatchAutoencoder(CONFIG)
    with pytest.raises(ValueError, match="2 patches: expected at least 48"):
        net.fit(images(1, 8)[..., :4])
    with pytest.raises(ValueError, match="component 6 of the patches has a standard deviation of"):
        net.fit(torch.zeros(8, 3, 16, 16))
