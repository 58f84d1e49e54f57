"""The Fréchet distance between the features of two sets of images (Heusel et al. 2017).

With means µ and covariances A, B of the features,

    d = |µ_a − µ_b|² + tr A + tr B − 2·tr (A·B)^½.

`torchmetrics` computes the value. It takes seconds for each at thousands of features, so the resamples use
roots instead: of the centred features X_a = Q_a·R_a, divided by (n − 1)^½, only the triangular R_a is
needed, because A = R_aᵀ·R_a and tr (A·B)^½ = ‖R_a·R_bᵀ‖_*, the sum of singular values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.analysis.metrics.bootstrap import Bootstrap, Estimate, estimate, too_few

FRECHET_LEAST = 10_000  # images from which Heusel et al. recommend the distance
PAIR_ROWS = 2048  # rows of a matrix of pairs that are computed at a time


class GivenFeatures(nn.Module):
    """A feature extractor of torchmetrics whose input is the features.

    Args:
        num_features: D, the width of a feature.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


class FeatureGaussian(NamedTuple):
    """The Gaussian of a set of features: its mean (D,), and a root (r, D) of its covariance, rootᵀ·root."""

    mean: Tensor
    root: Tensor


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, computed by torchmetrics in float64.

    Args:
        generated: Features, (n, D).
        reference: Features, (m, D).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_features(generated, reference)
    metric = FrechetInceptionDistance(feature=GivenFeatures(generated.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def fit_gaussian(features: Tensor, weights: np.ndarray | None = None) -> FeatureGaussian:
    """Return the Gaussian of features (n, D) float64 under weights (n,) that sum to n; None: all are 1."""
    n = len(features)
    if weights is None:
        rows, w = features, torch.ones(n, 1, dtype=features.dtype, device=features.device)
    else:
        kept = np.flatnonzero(weights)
        rows = features[torch.from_numpy(kept).to(features.device)]
        w = torch.from_numpy(weights[kept]).to(features)[:, None]
    mean = (w * rows).sum(0) / n
    return FeatureGaussian(mean, torch.linalg.qr((rows - mean) * (w / (n - 1)).sqrt(), mode="r").R)


def gaussian_distance(a: FeatureGaussian, b: FeatureGaussian) -> float:
    """Return the Fréchet distance of two Gaussians."""
    shared = torch.linalg.svdvals(a.root @ b.root.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * shared
    return float(distance)


def frechet_estimate(generated: Tensor, reference: Tensor, features: str, bootstrap: Bootstrap) -> Estimate:
    """Return the Fréchet distance with its bootstrap interval; both sets are resampled.

    Args:
        generated: Features, (n, D).
        reference: Features, (m, D).
        features: Name of the features.
        bootstrap: How the interval is computed.
    """
    value = frechet_distance(generated, reference)
    sets, n = (generated.double(), reference.double()), (len(generated), len(reference))
    drawn = [bootstrap.weights(len(each), stream) for stream, each in enumerate(sets)]
    resampled = [
        gaussian_distance(fit_gaussian(sets[0], first), fit_gaussian(sets[1], second))
        for first, second in zip(*drawn, strict=True)
    ]
    width = generated.shape[1]
    warnings = too_few("fid", n, FRECHET_LEAST, "its bias is large: compare it at equal numbers of images")
    warnings += too_few("fid", n, width + 1, f"the covariance of {width} features is singular")
    found = estimate("fid", features, value, np.array(resampled), bootstrap, n=n, warnings=warnings)
    return found.bounded(low=0)


def frechet_curve(
    generated: Tensor, reference: Tensor, *, points: int = 6, seed: int = 0
) -> list[tuple[int, float]]:
    """Return the Fréchet distance at growing numbers of generated images: (number, distance) for each.

    The distance is about linear in 1/n; its intercept is the distance at infinitely many images (Chong &
    Forsyth 2020).

    Args:
        generated: Features, (n, D).
        reference: Features, (m, D).
        points: Numbers of images, evenly spaced in 1/n from n/4 to n. Default: 6.
        seed: Seed of the order in which images are taken. Default: 0.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(generated))).to(generated.device)
    shuffled, n = generated.double()[order], len(generated)
    to = fit_gaussian(reference.double())
    numbers = sorted({max(2, round(1 / inverse)) for inverse in np.linspace(4 / n, 1 / n, points)})
    return [(number, gaussian_distance(fit_gaussian(shuffled[:number]), to)) for number in numbers]


def check_features(generated: Tensor, reference: Tensor) -> None:
    """Raise ValueError unless both are features (n, D) and (m, D) of at least two images."""
    shapes = tuple(generated.shape), tuple(reference.shape)
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise ValueError(f"features: expected (n, D) and (m, D), got {shapes[0]} and {shapes[1]}")
    if min(len(generated), len(reference)) < 2:
        raise ValueError(f"expected at least 2 images in each set, got {len(generated)} and {len(reference)}")
    if not bool(torch.isfinite(generated).all() and torch.isfinite(reference).all()):
        raise ValueError("features: expected finite numbers, got NaN or infinity")
