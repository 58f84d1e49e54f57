"""The maximum mean discrepancy between the features of two sets of images: KID and CMMD.

MMD² = mean k(x, x′) + mean k(y, y′) − 2·mean k(x, y)

KID (Bińkowski et al. 2018): the kernel (x·y/D + 1)³, without the pairs of an image with itself.
`torchmetrics` computes it, by the usual protocol: the mean over 100 random subsets of 1000 images.
CMMD (Jayasumana et al. 2024): the kernel exp(−|x − y|²/(2·10²)) of embeddings of length 1, all pairs, times
1000. No package takes features for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.analysis.metrics.bootstrap import Bootstrap, Estimate, estimate, too_few
from ldm.analysis.metrics.frechet import PAIR_ROWS, GivenFeatures, check_features

PairKernel = Callable[[Tensor, Tensor], Tensor]  # (n, D), (m, D) -> (n, m)
SUBSETS, SUBSET_SIZE = 100, 1000  # of the usual protocol of KID
SIGMA, SCALE = 10.0, 1000.0  # of CMMD


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return (x·y/D + 1)³ of all pairs, shape (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def radial(x: Tensor, y: Tensor) -> Tensor:
    """Return exp(−|x − y|²/(2σ²)) of all pairs with CMMD's σ, shape (n, m)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(squares / (-2 * SIGMA**2))


def pair_means(
    x: Tensor, y: Tensor, kernel: PairKernel, weights: tuple[Tensor, Tensor], *, distinct: bool = False
) -> Tensor:
    """Return the mean of a kernel over the pairs of two sets, for each of several weightings.

    Args:
        x: Features, (n, D).
        y: Features, (m, D).
        kernel: The kernel.
        weights: Weights of the images of each set, (R, n) and (R, m).
        distinct: Whether x and y are one set, and pairs of an image with itself are left out. Default: False.

    Returns:
        Shape (R,).
    """
    first, second = weights
    total = first.new_zeros(len(first))
    for start in range(0, len(x), PAIR_ROWS):
        rows = slice(start, start + PAIR_ROWS)
        values = kernel(x[rows], y)  # (block, m)
        if distinct:
            values.diagonal(start).zero_()
        total += ((first[:, rows] @ values) * second).sum(1)
    pairs = first.sum(1) * second.sum(1)
    return total / (pairs - (first * second).sum(1) if distinct else pairs)


def discrepancies(
    generated: Tensor, reference: Tensor, kernel: PairKernel, bootstrap: Bootstrap, *, distinct: bool
) -> np.ndarray:
    """Return MMD² of two sets and of their resamples.

    Args:
        generated: Features, (n, D) float64.
        reference: Features, (m, D) float64.
        kernel: The kernel.
        bootstrap: How both sets are resampled.
        distinct: Whether pairs of an image with itself are left out.

    Returns:
        Shape (1 + resamples,), that of the sets first.
    """
    w, v = (
        torch.cat(
            [each.new_ones(1, len(each)), torch.from_numpy(bootstrap.weights(len(each), stream)).to(each)]
        )
        for stream, each in enumerate((generated, reference))
    )
    within = pair_means(generated, generated, kernel, (w, w), distinct=distinct)
    within += pair_means(reference, reference, kernel, (v, v), distinct=distinct)
    return (within - 2 * pair_means(generated, reference, kernel, (w, v))).cpu().numpy()


def kernel_distance(generated: Tensor, reference: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Return KID, computed by torchmetrics in float64, and its standard error over the random subsets.

    Sets of fewer than 1000 images are compared whole, the larger one in a random part.

    Args:
        generated: Features, (n, D).
        reference: Features, (m, D).
        seed: Seed of the subsets. Default: 0.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    check_features(generated, reference)
    size = min(SUBSET_SIZE, len(generated), len(reference))
    subsets = 1 if size == len(generated) == len(reference) else SUBSETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features", category=UserWarning)
        metric = KernelInceptionDistance(
            feature=GivenFeatures(generated.shape[1]), subsets=subsets, subset_size=size
        )
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation) / subsets**0.5


def kernel_estimate(generated: Tensor, reference: Tensor, features: str, bootstrap: Bootstrap) -> Estimate:
    """Return KID with its bootstrap interval; both sets are resampled.

    Args:
        generated: Features, (n, D).
        reference: Features, (m, D).
        features: Name of the features.
        bootstrap: How the interval is computed.
    """
    value, error = kernel_distance(generated, reference, seed=bootstrap.seed)
    resampled = discrepancies(generated.double(), reference.double(), polynomial, bootstrap, distinct=True)[
        1:
    ]
    n = (len(generated), len(reference))
    return estimate(
        "kid",
        features,
        value,
        resampled,
        bootstrap,
        n=n,
        sampling_error=error,
        unbiased=True,
        warnings=too_few("kid", n, SUBSET_SIZE, "it is not the usual mean over subsets of as many"),
    )


def clip_discrepancy(generated: Tensor, reference: Tensor) -> float:
    """Return CMMD of CLIP embeddings (n, D) and (m, D), which are scaled to length 1."""
    check_features(generated, reference)
    x, y = (F.normalize(each.double(), dim=1) for each in (generated, reference))
    w, v = x.new_ones(1, len(x)), y.new_ones(1, len(y))
    within = pair_means(x, x, radial, (w, w)) + pair_means(y, y, radial, (v, v))
    return SCALE * float(within - 2 * pair_means(x, y, radial, (w, v)))


def clip_discrepancy_estimate(
    generated: Tensor, reference: Tensor, features: str, bootstrap: Bootstrap
) -> Estimate:
    """Return CMMD with its bootstrap interval; both sets are resampled.

    Args:
        generated: CLIP embeddings, (n, D).
        reference: CLIP embeddings, (m, D).
        features: Name of the CLIP.
        bootstrap: How the interval is computed.
    """
    check_features(generated, reference)
    x, y = (F.normalize(each.double(), dim=1) for each in (generated, reference))
    value, *resampled = SCALE * discrepancies(x, y, radial, bootstrap, distinct=False)
    n = (len(generated), len(reference))
    few = too_few("cmmd", n, SUBSET_SIZE, "its bias is large: compare it at equal numbers of images")
    found = estimate("cmmd", features, float(value), np.array(resampled), bootstrap, n=n, warnings=few)
    return found.bounded(low=0)
