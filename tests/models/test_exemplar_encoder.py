"""The exemplar encoder: what its tokens depend on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shared_weights import fill

from ldm.models.exemplars import ExemplarConfig, ExemplarEncoder
from ldm.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig

CONFIG = ExemplarConfig(size=16, patch=8, cell=4, components=5, width=16, head_dim=8)


def exemplars(k: int = 2, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, k, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def make() -> ExemplarEncoder:
    net = fill(ExemplarEncoder(CONFIG))
    g = torch.Generator().manual_seed(2)
    net.use_basis(torch.randn(5, 48, 1, 1, generator=g) / 7, torch.randn(5, generator=g))
    return net


def test_each_exemplar_has_its_own_tokens():
    net, images = make(), exemplars()
    out = net(images)
    assert out.shape == (1, 2 * 4, 16)
    other = images.clone()
    other[:, 1] = 1 - other[:, 1]
    changed = net(other)
    assert torch.equal(changed[:, :4], out[:, :4]) and not torch.allclose(
        changed[:, 4:], out[:, 4:], atol=1e-3
    )


def test_slots_tell_equal_exemplars_apart():
    same = exemplars(1).expand(1, 2, 4, 16, 16)
    first, second = make()(same).chunk(2, dim=1)
    assert not torch.allclose(first, second, atol=1e-3)


def test_colors_that_are_fully_transparent_do_not_matter():
    net, images = make(), exemplars()
    images[:, :, 3] = (images[:, :, 3] > 0.5).float()
    hidden = images.clone()
    hidden[:, :, :3] = torch.where(images[:, :, 3:] > 0, images[:, :, :3], 0.3)
    assert torch.equal(net(hidden), net(images))
    opaque = images.clone()
    opaque[:, :, 3] = 1
    assert not torch.allclose(net(opaque), net(images), atol=1e-3)


def test_cells_are_projected_as_the_autoencoder_projects_them():
    torch.manual_seed(0)
    autoencoder = PatchAutoencoder(PatchAutoencoderConfig(factor=4, latent_channels=6, channels=(8, 16)))
    coarse = torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    autoencoder.fit(F.interpolate(coarse, size=(16, 16), mode="bilinear"))
    net, images = make(), exemplars(1)[0]
    net.use_basis(autoencoder.project.weight, autoencoder.project.bias)
    images[:, 3] = 1
    latent = autoencoder.encode(2 * images[:, :3] - 1).mode()[:, :5]  # (1, 5, 4, 4)
    patches = net.patches(images)  # (1, 4, 6·4)
    assert torch.allclose(patches[0, 1].view(6, 2, 2)[:5], latent[0, :, :2, 2:], atol=1e-5)
    assert torch.equal(patches[0, 1].view(6, 2, 2)[5], torch.ones(2, 2))
    with pytest.raises(ValueError, match="the projection has shape"):
        net.use_basis(autoencoder.project.weight[:4], autoencoder.project.bias[:4])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="size 20: expected a multiple of 8"):
        ExemplarConfig(size=20, patch=8)
    for wrong in (exemplars(3), exemplars()[:, :, :3], exemplars()[..., :8]):
        with pytest.raises(ValueError, match="expected \\(B, up to 2, 4, 16, 16\\)"):
            make()(wrong)
