"""Metrics of sets: closed forms, parity with torchmetrics, torch-fidelity and clean-fid, and intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.analysis.metrics.bootstrap import Bootstrap
from ldm.analysis.metrics.frechet import (
    fit_gaussian,
    frechet_curve,
    frechet_distance,
    frechet_estimate,
    gaussian_distance,
)
from ldm.analysis.metrics.kernels import (
    clip_discrepancy,
    clip_discrepancy_estimate,
    discrepancies,
    kernel_distance,
    kernel_estimate,
    polynomial,
)
from ldm.analysis.metrics.manifold import (
    manifold_estimates,
    mean_estimate,
    nearest_images,
    precision_and_recall,
    realism,
)

FEW = Bootstrap(resamples=50)


def features(n: int, width: int = 24, *, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Return n features (n, width) float64 with a spectrum and correlations."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return scale * (z * torch.linspace(0.1, 2, width)) @ mixing / width**0.5 + shift


def whitened(n: int, width: int) -> Tensor:
    """Return features of mean exactly 0 and covariance exactly 1."""
    z = features(n, width)
    z = z - z.mean(0)
    return torch.linalg.solve(torch.linalg.cholesky(z.T.cov()), z.T).T


# The Fréchet distance


def test_frechet_distance_of_gaussians():
    """For axis-aligned Gaussians the distance is |µa − µb|² + Σ (σa − σb)²."""
    z = whitened(400, 3)
    a = z * torch.tensor([1, 2, 3]) + torch.tensor([0, 0, 1])
    b = z * torch.tensor([2, 2, 1]) + torch.tensor([1, 0, 0])
    assert frechet_distance(a, b) == pytest.approx(2 + 1 + 0 + 4, rel=1e-6)
    assert gaussian_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(7, rel=1e-10)
    assert gaussian_distance(fit_gaussian(a), fit_gaussian(a)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("n, m", [(200, 150), (30, 20)], ids=["many", "few"])
def test_frechet_distance_equals_the_packages(n, m):
    cleanfid = pytest.importorskip("cleanfid.fid")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = features(n, 24), features(m, 24, seed=5, shift=0.3, scale=1.2)
    own = frechet_distance(x, y)
    assert own == pytest.approx(gaussian_distance(fit_gaussian(x), fit_gaussian(y)), rel=1e-6)
    stats = [fid_features_to_statistics(each) for each in (x, y)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert own == pytest.approx(theirs, rel=1e-6)
    moments = [(each.numpy().mean(0), np.cov(each.numpy(), rowvar=False)) for each in (x, y)]
    assert own == pytest.approx(cleanfid.frechet_distance(*moments[0], *moments[1]), rel=1e-6)


def test_weights_of_a_fit_are_repetitions():
    x = features(40)
    weights = np.array([2.0, 0.0, *[1.0] * 38])
    repeated = torch.cat([x[:1], x[:1], x[2:]])
    a, b = fit_gaussian(x, weights), fit_gaussian(repeated)
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.root.T @ a.root, b.root.T @ b.root)


def test_the_curve_of_the_frechet_distance_falls_and_ends_at_its_value():
    x, y = features(256), features(300, seed=3)
    curve = frechet_curve(x, y)
    assert [n for n, _ in curve][::5] == [64, 256]
    assert curve[-1][1] == pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert curve[0][1] > curve[-1][1]


# Kernels


def test_kernel_distance_equals_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(80), features(80, seed=5, shift=0.2)
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=80, verbose=False)
    own, error = kernel_distance(x, y)
    assert own == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6) and error == 0
    assert own == pytest.approx(discrepancies(x, y, polynomial, FEW, distinct=True)[0], rel=1e-9)


def test_kernel_distance_is_the_mean_over_random_subsets(monkeypatch):
    monkeypatch.setattr("ldm.analysis.metrics.kernels.SUBSET_SIZE", 60)
    x, y = features(80), features(90, seed=5, shift=0.5)
    state = torch.random.get_rng_state()
    value, error = kernel_distance(x, y)
    assert (value, error) == kernel_distance(x, y)  # the subsets depend on the seed alone
    assert torch.equal(state, torch.random.get_rng_state())
    exact = discrepancies(x, y, polynomial, FEW, distinct=True)[0]
    assert 0 < error < 0.1 * value and value == pytest.approx(exact, abs=4 * error)


def test_clip_discrepancy_is_the_mean_over_all_pairs():
    x, y = (torch.nn.functional.normalize(features(n, seed=n), dim=1) for n in (7, 9))

    def mean(a: Tensor, b: Tensor) -> float:
        return float(np.mean([np.exp(-float((p - q).square().sum()) / 200) for p in a for q in b]))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert clip_discrepancy(3 * x, 0.5 * y) == pytest.approx(expected, rel=1e-9)  # lengths do not count
    assert clip_discrepancy(x, x) == pytest.approx(0, abs=1e-9)


def test_blocks_of_pairs_change_nothing(monkeypatch):
    x, y = features(50), features(40, seed=2)
    whole = discrepancies(x, y, polynomial, FEW, distinct=True)
    monkeypatch.setattr("ldm.analysis.metrics.kernels.PAIR_ROWS", 7)
    np.testing.assert_allclose(discrepancies(x, y, polynomial, FEW, distinct=True), whole, rtol=1e-10)


# Manifolds


def test_precision_and_recall_of_a_line():
    """The balls of 0, 1, 2, 3 with k = 1 have radius 1: they cover [−1, 4]."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    generated = torch.tensor([[3.5], [4.0], [4.5], [9.0]])  # radii 0.5, 0.5, 0.5, 4.5
    assert precision_and_recall(generated, reference, k=1) == (0.5, 0.25)
    expected = torch.tensor([2.0, 1.0, 1 / 1.5, 1 / 6])
    torch.testing.assert_close(realism(generated, reference, k=1), expected)
    assert realism(reference[1:2], reference, k=1) == torch.inf


def test_manifold_estimates_equal_torch_fidelity():
    x, y = features(60), features(70, seed=5, shift=0.3)
    for found, expected in zip(manifold_estimates(x, y, "f", FEW), precision_and_recall(x, y), strict=True):
        assert found.value == expected and found.low <= expected <= found.high and found.better == "higher"
    inside = (realism(x, y) >= 1).double().mean()
    assert float(inside) == pytest.approx(precision_and_recall(x, y)[0], rel=1e-6)


def test_nearest_images(monkeypatch):
    monkeypatch.setattr("ldm.analysis.metrics.manifold.PAIR_ROWS", 2)
    x = torch.tensor([[0.0], [1.0], [5.0]])
    found = nearest_images(x, x, same=True)
    assert found.number.tolist() == [1, 0, 1] and found.distance.tolist() == [1, 1, 4]
    assert nearest_images(x, x).distance.tolist() == [0, 0, 0]


# Intervals

PAIRED = [frechet_estimate, kernel_estimate, clip_discrepancy_estimate]


@pytest.mark.parametrize("measure", PAIRED)
def test_two_halves_of_a_set_lie_within_their_own_interval(measure):
    """The interval of two halves covers them, and the halves of other splits as often as it states."""
    whole = features(300)
    splits = [torch.randperm(300, generator=torch.Generator().manual_seed(i)) for i in range(13)]
    halves = [(whole[order[:150]], whole[order[150:]]) for order in splits]
    found = measure(*halves[0], "f", FEW)
    assert found.low <= found.value <= found.high and found.level == 0.95
    plain = {
        "fid": lambda a, b: gaussian_distance(fit_gaussian(a), fit_gaussian(b)),
        "kid": lambda a, b: kernel_distance(a, b)[0],
        "cmmd": clip_discrepancy,
    }[found.metric]
    assert sum(found.low <= plain(*each) <= found.high for each in halves[1:]) >= 11


@pytest.mark.parametrize("measure", PAIRED)
def test_intervals_are_as_wide_as_the_spread_of_fresh_sets(measure):
    """For sets that differ, a bootstrap interval has about the width of ± 1.96 standard deviations."""

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        return features(150, 8, seed=2 * seed, shift=1.0), features(150, 8, seed=2 * seed + 1)

    found = [measure(*draw(seed), "f", Bootstrap(resamples=60, seed=seed)) for seed in range(8)]
    fresh = [measure(*draw(seed), "f", Bootstrap(resamples=20)).value for seed in range(100, 140)]
    half = np.mean([(each.high - each.low) / 2 for each in found])
    assert 0.7 < half / (1.96 * np.std(fresh)) < 1.6
    assert sum(each.low <= np.mean(fresh) <= each.high for each in found) >= 6


def test_the_interval_of_a_mean_is_that_of_the_central_limit_theorem():
    scores = torch.randn(400, generator=torch.Generator().manual_seed(2)) * 3 + 20
    found = mean_estimate(scores, "clip_score", "f", Bootstrap(resamples=2000))
    assert found.value == pytest.approx(float(scores.double().mean()), rel=1e-12)
    half = 1.96 * float(scores.std()) / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.bias == 0 and found.reference is None


def test_the_bias_of_the_frechet_distance_is_stated():
    """Of two sets of one distribution the distance is all bias, about what the bootstrap states."""
    found = frechet_estimate(features(200), features(200, seed=9), "f", FEW)
    assert found.bias == pytest.approx(found.value, rel=0.3)


def test_few_images_are_warned_of():
    x, y = features(30, 40), features(50, 40, seed=4)
    texts = " ".join(frechet_estimate(x, y, "f", FEW).warnings)
    assert "30 images" in texts and "10000" in texts and "40 features is singular" in texts
    assert "1000" in kernel_estimate(x, y, "f", FEW).warnings[0]
    assert "5000" in manifold_estimates(x, y, "f", FEW)[0].warnings[0]
    assert mean_estimate(torch.ones(100), "clip_score", "f", FEW).warnings == ()


@pytest.mark.parametrize(
    "x, y, message",
    [
        (features(5), features(5, 10), r"\(5, 24\) and \(5, 10\)"),
        (features(1), features(5), "at least 2 images in each set, got 1 and 5"),
        (features(5) * float("nan"), features(5), "NaN"),
    ],
)
def test_impossible_sets_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, y)


def test_few_neighbours_are_refused():
    with pytest.raises(ValueError, match="more than 3 images in each set, got 3 and 9"):
        precision_and_recall(features(3), features(9))


def test_a_bootstrap_states_what_it_needs():
    with pytest.raises(ValueError, match="resamples: .* at least 20"):
        Bootstrap(resamples=5)
    with pytest.raises(ValueError, match="level: .* got 1"):
        Bootstrap(level=1)
    weights = Bootstrap(resamples=30).weights(11)
    assert weights.shape == (30, 11) and (weights.sum(1) == 11).all()
    assert not (weights == Bootstrap(resamples=30).weights(11, 1)).all()
