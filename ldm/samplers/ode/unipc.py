"""UniPC: a unified predictor-corrector, one evaluation a step."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, choose, lam, states

History = list[tuple[float, Tensor]]  # (lambda, x0), the newest first


def unipc(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
) -> Tensor:
    """UniP-p predicts the next state; its evaluation then corrects the state it was taken at, by UniC-p
    (arXiv:2302.04867, algorithms 5, 7).

    Data prediction, B(h) = h (``bh1``) or e^h − 1 (``bh2``), order p 1, 2 or 3, at most the history's length,
    and with ``lower_order_final`` at most the number of steps left; a step to clean data or from pure noise
    is of order 1 and stays uncorrected.
    """
    choose(variant, ("bh1", "bh2"), "variant")
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    alpha, sigma = states(grid)
    lams = [lam(a, s) for a, s in zip(alpha, sigma, strict=True)]
    history: History = []
    # the state that the last step left from, its order, whether on_step moved its end
    before, used, moved = (x, 0, False)
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        if history and not moved:
            x = _step(before, history[:used], alpha[i], sigma[i - 1 : i + 1], lams[i], variant, d.x0)
        if math.isfinite(lams[i]):
            history = [(lams[i], d.x0), *history][:3]
        used = min(order, len(history), len(grid) - i if lower_order_final else order)
        before = x
        if math.isfinite(lams[i + 1]) and math.isfinite(lams[i]):
            x = _step(before, history[:used], alpha[i + 1], sigma[i : i + 2], lams[i + 1], variant, None)
        else:
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(lams[i] - lams[i + 1]) * d.x0
        predicted = x
        x, stop = after(on_step, i, x, d)
        moved = x is not predicted  # what the caller put there is not corrected
        if stop:
            break
    return x


def _step(
    before: Tensor,
    history: History,
    alpha: float,
    sigmas: list[float],
    lam_next: float,
    variant: str,
    new: Tensor | None,
) -> Tensor:
    """From the newest state of the history to lam_next: predicted, or with ``new``, the x0 found there,
    corrected  (eq. 3 and 9)."""
    lam_0, x_0 = history[0]
    k = lam_0 - lam_next  # −h
    scale = k if variant == "bh1" else math.expm1(k)
    nodes = [(lam - lam_0) / -k for lam, _ in history[1:]]  # r_m < 0
    differences = [(x_m - x_0) / r for r, (_, x_m) in zip(nodes, history[1:], strict=True)]
    if new is not None:
        nodes.append(1.0)
        differences.append(new - x_0)
    x = sigmas[1] / sigmas[0] * before - alpha * math.expm1(k) * x_0
    for weight, difference in zip(_weights(nodes, k, scale), differences, strict=True):
        x = x - alpha * scale * weight * difference
    return x


def _weights(nodes: list[float], k: float, scale: float) -> list[float]:
    """The a_m with sum_m a_m·r_m^(n−1) = n!·phi_(n+1)/B for n = 1 … M; one half where there is a single node,
    as in the paper's code."""
    if len(nodes) < 2:
        return [0.5] * len(nodes)
    moments, phi, factorial = [], math.expm1(k) / k - 1, 1
    for n in range(1, len(nodes) + 1):
        moments.append(phi * factorial / scale)
        factorial *= n + 1
        phi = phi / k - 1 / factorial
    matrix = np.array([[r ** (n - 1) for r in nodes] for n in range(1, len(nodes) + 1)])
    return [float(weight) for weight in np.linalg.solve(matrix, np.array(moments))]
