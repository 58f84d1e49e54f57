"""UniPC: a predictor and a corrector (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 7).

With lambda = log(alpha/sigma), h = lambda' − lambda and the differences D_m = x0_m − x0 of earlier estimates
at r_m = (lambda_m − lambda)/h, a step of order p in data prediction is (eq. 3 and 9)

    x' = (sigma'/sigma)·x − alpha'·(e^(−h) − 1)·x0 − alpha'·B(h)·sum_m a_m·D_m/r_m

UniP-p predicts x' from p − 1 differences. The evaluation at x' then gives one more difference (r = 1), with
which UniC-p computes x' again. The a_m solve sum_m a_m·r_m^(n−1) = n!·phi_(n+1)/B(h) for n = 1, 2, …; B(h) is
−h (bh1) or e^(−h) − 1 (bh2). A step to clean data or from pure noise is of order 1 and is not corrected.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, check_choice, half_log_snrs

History = list[tuple[float, Tensor]]  # (lambda, x0), newest first


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
    """Sample with UniPC (Zhao et al. 2023, algorithms 5 and 7), one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: Not used. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. A state that it replaces is
            not corrected. Default: None.
        order: p, 1, 2 or 3; at most the number of evaluations so far. Default: 2.
        variant: B(h): "bh1" or "bh2". Default: "bh2".
        lower_order_final: Whether the order is at most the number of steps left. Default: True.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If the order or the variant is unknown.
    """
    check_choice(variant, ("bh1", "bh2"), "variant")
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    (alpha, sigma), lam = alphas_sigmas(grid), half_log_snrs(grid)
    history: History = []
    # of the last step: its first state, its order, whether on_step replaced its result
    start, used, replaced = x, 0, False
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        if history and not replaced:
            x = _step(start, history[:used], alpha[i], sigma[i - 1 : i + 1], lam[i], variant, d.x0)
        if math.isfinite(lam[i]):
            history = [(lam[i], d.x0), *history][:3]
        start, used = x, min(order, len(history), len(grid) - i if lower_order_final else order)
        if math.isfinite(lam[i + 1]) and math.isfinite(lam[i]):
            x = _step(start, history[:used], alpha[i + 1], sigma[i : i + 2], lam[i + 1], variant, None)
        else:
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(lam[i] - lam[i + 1]) * d.x0
        predicted = x
        x, stop = call_on_step(on_step, i, x, d)
        replaced = x is not predicted
        if stop:
            break
    return x


def _step(
    start: Tensor,
    history: History,
    alpha: float,
    sigmas: list[float],
    lam_next: float,
    variant: str,
    new_x0: Tensor | None,
) -> Tensor:
    """Return the step from the newest entry of the history to lam_next (arXiv:2302.04867, eq. 3 and 9).

    Args:
        start: The state at the newest entry of the history, shape (B, *S).
        history: The last p estimates of x0.
        alpha: alpha of the next state.
        sigmas: sigma of the state and of the next state.
        lam_next: lambda of the next state.
        variant: "bh1" or "bh2".
        new_x0: x0 at the next state, for the corrector; None for the predictor.
    """
    lam_0, x_0 = history[0]
    k = lam_0 - lam_next  # −h
    scale = k if variant == "bh1" else math.expm1(k)  # B(h)
    nodes = [(lam - lam_0) / -k for lam, _ in history[1:]]  # r_m < 0
    slopes = [(x_m - x_0) / r for r, (_, x_m) in zip(nodes, history[1:], strict=True)]  # D_m/r_m
    if new_x0 is not None:
        nodes.append(1.0)
        slopes.append(new_x0 - x_0)
    x = sigmas[1] / sigmas[0] * start - alpha * math.expm1(k) * x_0
    for a, slope in zip(_weights(nodes, k, scale), slopes, strict=True):
        x = x - alpha * scale * a * slope
    return x


def _weights(nodes: list[float], k: float, scale: float) -> list[float]:
    """Return a_m with sum_m a_m·r_m^(n−1) = n!·phi_(n+1)/B for n = 1 … M; one half for a single node.

    One half is what the authors' code uses in place of the solution for M = 1; the order stays the same.

    Args:
        nodes: r_m of the M differences.
        k: −h.
        scale: B(h).
    """
    if len(nodes) < 2:
        return [0.5] * len(nodes)
    moments, phi, factorial = [], math.expm1(k) / k - 1, 1
    for n in range(1, len(nodes) + 1):
        moments.append(phi * factorial / scale)
        factorial *= n + 1
        phi = phi / k - 1 / factorial
    matrix = np.array([[r ** (n - 1) for r in nodes] for n in range(1, len(nodes) + 1)])
    return [float(weight) for weight in np.linalg.solve(matrix, np.array(moments))]
