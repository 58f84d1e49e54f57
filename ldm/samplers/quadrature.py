"""Weights of linear multistep methods: integrals of interpolating polynomials over steps of any length.

For nodes u_j with Lagrange polynomials l_j, a function known at the nodes is integrated as

    integral from a to b of w(u)·f(u) du  ≈  sum_j W_j·f(u_j),   W_j = integral from a to b of w(u)·l_j(u) du
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np


def lagrange_weights(
    nodes: Sequence[float], start: float, end: float, weight: Callable[[np.ndarray], np.ndarray] | None = None
) -> list[float]:
    """Return W_j, the integral from start to end of weight(u)·l_j(u) du, for every node.

    Gauss–Legendre quadrature with 24 points is exact for polynomials up to degree 47, and exact to rounding
    for exp on a sampler's steps.

    Args:
        nodes: The interpolation nodes u_j.
        start: Lower limit of the integral.
        end: Upper limit of the integral.
        weight: The weight function w, vectorised. Default: 1.
    """
    points, weights = _gauss_legendre()
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
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    """Return the points and weights of Gauss–Legendre quadrature on [−1, 1]."""
    return np.polynomial.legendre.leggauss(24)
