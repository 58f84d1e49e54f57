"""Precision, recall, realism and nearest neighbours in the space of features (Kynkäänniemi et al. 2019).

The manifold of a set is the union of balls, one around each image, that reach its k-th nearest other image.
Precision is the share of generated images in the manifold of the reference images, recall the share of
reference images in that of the generated ones. `torch-fidelity` computes both. The realism of an image is the
largest ratio of a ball's radius to the distance from its centre; it is at least 1 inside the manifold.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.analysis.metrics.bootstrap import Bootstrap, Estimate, estimate, too_few
from ldm.analysis.metrics.frechet import PAIR_ROWS, check_features

NEIGHBOURS = 3  # k of Kynkäänniemi et al.
MANIFOLD_LEAST = 5_000  # images; at fewer, the balls are large


class Nearest(NamedTuple):
    """The nearest images of another set: their distances (n,) and their numbers (n,), int64."""

    distance: Tensor
    number: Tensor


def precision_and_recall(generated: Tensor, reference: Tensor, *, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Return precision and recall, computed by torch-fidelity in float64.

    Args:
        generated: Features, (n, D), n > k.
        reference: Features, (m, D), m > k.
        k: Which nearest neighbour a ball reaches. Default: 3.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    check_features(generated, reference)
    check_neighbours(k, generated, reference)
    found = prc_features_to_metric(
        generated.double(),
        reference.double(),
        prc_neighborhood=k,
        prc_batch_size=PAIR_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]


def radii(points: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Return the distance of each of n points (n, D) to its k-th nearest other point, (n,)."""
    parts = [torch.cdist(part, points).kthvalue(k + 1).values for part in points.split(PAIR_ROWS)]
    return torch.cat(parts)


def realism(queries: Tensor, points: Tensor, *, k: int = NEIGHBOURS) -> Tensor:
    """Return the realism of queries (n, D) under the manifold of points (m, D), (n,); infinite at a point."""
    reach = radii(points, k)
    parts = []
    for part in queries.split(PAIR_ROWS):
        distance = torch.cdist(part, points)
        ratio = torch.where(distance > 0, reach / distance, torch.inf)
        parts.append(ratio.amax(1))
    return torch.cat(parts)


def nearest_images(queries: Tensor, points: Tensor, *, same: bool = False) -> Nearest:
    """Return the nearest point of each query.

    Args:
        queries: Features, (n, D).
        points: Features, (m, D).
        same: Whether queries and points are one set, in which a point is not its own neighbour.
            Default: False.
    """
    found = []
    for start in range(0, len(queries), PAIR_ROWS):
        distance = torch.cdist(queries[start : start + PAIR_ROWS], points)
        if same:
            distance.diagonal(start).fill_(torch.inf)
        found.append(distance.min(1))
    return Nearest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def manifold_estimates(
    generated: Tensor, reference: Tensor, features: str, bootstrap: Bootstrap, *, k: int = NEIGHBOURS
) -> list[Estimate]:
    """Return precision and recall with their bootstrap intervals.

    Precision resamples the generated images, recall the reference images. The balls stay: the nearest other
    image of an image that is drawn twice would be itself.

    Args:
        generated: Features, (n, D), n > k.
        reference: Features, (m, D), m > k.
        features: Name of the features.
        bootstrap: How the intervals are computed.
        k: Which nearest neighbour a ball reaches. Default: 3.
    """
    values = precision_and_recall(generated, reference, k=k)
    x, y = generated.double(), reference.double()
    n = (len(x), len(y))
    found = []
    for name, value, queries, points in (("precision", values[0], x, y), ("recall", values[1], y, x)):
        inside = (realism(queries, points, k=k) >= 1).double().cpu().numpy()
        found.append(
            estimate(
                name,
                features,
                value,
                bootstrap.weights(len(inside)) @ inside / len(inside),
                bootstrap,
                n=n,
                better="higher",
                unbiased=True,
                warnings=too_few(name, n, MANIFOLD_LEAST, "the balls are large, and it is high"),
            ).bounded(0, 1)
        )
    return found


def mean_estimate(values: Tensor, metric: str, features: str, bootstrap: Bootstrap) -> Estimate:
    """Return the mean of a score of each generated image, (n,), with its bootstrap interval.

    Args:
        values: The scores, (n,).
        metric: Name of the metric.
        features: Name of the features.
        bootstrap: How the interval is computed.
    """
    scores = values.double().cpu().numpy()
    resampled = bootstrap.weights(len(scores)) @ scores / len(scores)
    n = (len(scores), None)
    few = too_few(metric, (len(scores),), 100, "its interval is wide")
    return estimate(
        metric,
        features,
        float(np.mean(scores)),
        resampled,
        bootstrap,
        n=n,
        better="higher",
        unbiased=True,
        warnings=few,
    )


def check_neighbours(k: int, generated: Tensor, reference: Tensor) -> None:
    """Raise ValueError unless both sets have more than k images."""
    if min(len(generated), len(reference)) <= k:
        raise ValueError(
            f"precision and recall reach the {k}. nearest image: expected more than {k} images in each set,"
            f" got {len(generated)} and {len(reference)}"
        )
