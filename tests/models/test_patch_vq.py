"""The vector-quantized patch autoencoder: its clusters, its projection, its decoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.models.patch_vq import PatchVQ, PatchVQConfig
from ldm.models.vae import psnr
from ldm.models.vq import Codebook

CONFIG = PatchVQConfig(codes=12, factor=4, latent_channels=6, channels=(8, 16))


def images(n: int = 24, side: int = 16) -> torch.Tensor:
    """Return smooth random images (n, 3, side, side) in [−1, 1]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)


def fitted(config: PatchVQConfig = CONFIG) -> PatchVQ:
    torch.manual_seed(0)
    net = PatchVQ(config)
    net.fit(images())
    return net


def test_a_cluster_without_rows_begins_again_where_the_error_is_largest() -> None:
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for seed in range(5):  # some of the first choices are equal rows, of which one has a cluster
        book = Codebook(5, 3)
        book.fit(points.repeat_interleave(40, 0), seed=seed)
        indices = book.nearest(points.T[None, :, :, None]).flatten()
        assert len(indices.unique()) == 5
        assert torch.allclose(book.embedding.weight[indices], points, atol=1e-6)


def test_each_iteration_lowers_the_error_and_a_vector_is_the_mean_of_its_rows() -> None:
    rows = torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    errors = [Codebook(16, 4).fit(rows, iterations=n) for n in (1, 2, 5, 200)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    book = Codebook(16, 4)
    book.fit(rows, iterations=200)  # has converged
    indices = book.nearest(rows.T[None, :, :, None]).flatten()
    for code in range(16):
        assert torch.allclose(book.embedding.weight[code], rows[indices == code].mean(0), atol=1e-5)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows: 3, expected at least one for each of 4"):
        Codebook(4, 2).fit(torch.randn(3, 2))


def test_a_codebook_for_every_patch_loses_nothing() -> None:
    x = images(4, 8)  # 16 different patches, of 12 numbers each
    net = PatchVQ(PatchVQConfig(codes=64, factor=2, latent_channels=12, channels=(8,)))
    assert net.fit(x) < 1e-9
    assert float(psnr(net.decode(net.encode(x).mode()), x).min()) > 80


def test_repeated_patches_count_once() -> None:
    x = images(8)
    flat = torch.cat([x, torch.full((500, 3, 16, 16), 0.3)])  # one more patch, very often
    a, b = (PatchVQ(CONFIG) for _ in range(2))
    for net, given in ((a, x), (b, flat)):
        net.fit(given)
    assert len(a.indices(a.encode(x).mode()).unique()) == 12
    assert len(b.indices(b.encode(x).mode()).unique()) >= 11


def test_the_token_of_a_patch_is_the_code_nearest_in_pixels() -> None:
    net, x = fitted(PatchVQConfig(codes=12, factor=2, latent_channels=12, channels=(8,))), images()
    indices = net.indices(net.encode(x).mode())
    assert indices.shape == (24, 8, 8)
    means = F.pixel_unshuffle(net.decode_indices(torch.arange(12).view(12, 1, 1)), 2).flatten(1)  # (K, 12)
    patches = F.pixel_unshuffle(x, 2).movedim(1, -1).flatten(0, -2)
    assert torch.equal(torch.cdist(patches, means).argmin(1), indices.flatten())


def test_the_residual_sees_neighbours_and_learns() -> None:
    net, x = fitted(), images()
    indices = net.indices(net.encode(x).mode())
    before = float(psnr(net.decode_indices(indices), x).mean())
    optimizer = torch.optim.Adam(net.residual.parameters(), lr=3e-3)
    for _ in range(60):
        loss = (net.decode_indices(indices) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(psnr(net.decode_indices(indices), x).mean()) > before + 0.5
    other = indices.clone()
    other[:, 3, 3] = (other[:, 3, 3] + 1) % 12
    assert not torch.equal(
        net.decode_indices(other)[:, :, :12, :12], net.decode_indices(indices)[:, :, :12, :12]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": 0}, "codes"),
        ({"latent_channels": 49}, "at most 48"),
        ({"channels": (8, 8, 8, 8)}, "factor 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchVQConfig(**{**vars(CONFIG), **changes})


def test_sizes_that_are_no_multiples_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        fitted().encode(torch.zeros(1, 3, 18, 16))
