"""Integrals of interpolating polynomials: the weights of Adams–Bashforth methods on steps of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np


def lagrange_weights(
    nodes: Sequence[float], start: float, end: float, weight: Callable[[np.ndarray], np.ndarray] | None = None
) -> list[float]:
    """integral from start to end of weight(u)·l_j(u) du for the Lagrange polynomials l_j of the nodes.

    Gauss–Legendre with 24 points: exact for polynomials (weight None) up to degree 47, and to rounding for
    exp on a sampler's steps.
    """
    points, weights = _rule()
    u = start + (end - start) * (points + 1) / 2
    density = weights * (end - start) / 2 * (1.0 if weight is None else weight(u))
    result = []
    for j, node in enumerate(nodes):
        basis = np.ones_like(u)
        for k, other in enumerate(nodes):
            if k != j:
                basis *= (u - other) / (node - other)
        result.append(float((density * basis).sum()))
    return result


@cache
def _rule() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(24)
