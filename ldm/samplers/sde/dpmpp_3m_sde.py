"""DPM-Solver++(3M) SDE: third order in its deterministic part, one evaluation a step."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, choose, demand, lam, states


def dpmpp_3m_sde(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    curvature: Literal["exact", "published"] = "exact",
) -> Tensor:
    """``dpmpp_2m_sde`` with x0 as a parabola in lambda through three evaluations, by exponential-integrator
    weights phi_2 and phi_3.

    phi_2 = (e^(−k) − 1)/k + 1, phi_3 = phi_2/k − 1/2 with k = (1 + eta)·h. eta >= 0; 0 is deterministic. The
    first step is of order 1, the second of order 2; a step to clean data or from pure noise is of order 1,
    and history before pure noise is not used.

    With s = (lambda − lambda_i)/h the parabola is x0 + d1·s + d2·s², and the integral of s² is 2·phi_3: the
    published code and its ports weigh d2 by phi_3, half of that, which makes the method second order.
    ``curvature`` "published" does as they do.
    """
    choose(curvature, ("exact", "published"), "curvature")
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    draw = demand(noise, "dpmpp_3m_sde") if eta > 0 else None
    alpha, sigma = states(grid)
    lams = [lam(a, s) for a, s in zip(alpha, sigma, strict=True)]
    history: list[tuple[float, Tensor]] = []  # (lambda, x0) of finite lambda, the newest first
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        h = lams[i + 1] - lams[i]
        k = (1 + eta) * h
        x = (
            sigma[i + 1] / sigma[i] * (math.exp(-eta * h) if eta else 1.0) * x
            - alpha[i + 1] * math.expm1(-k) * d.x0
        )
        if math.isfinite(lams[i]):
            history = [(lams[i], d.x0), *history][:3]
        if math.isfinite(h) and len(history) > 1:
            x = x + alpha[i + 1] * _curve(history, h, k, 2.0 if curvature == "exact" else 1.0)
        if draw is not None and sigma[i + 1] > 0:
            x = x + sigma[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise * draw(i, x)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x


def _curve(history: list[tuple[float, Tensor]], h: float, k: float, weight: float) -> Tensor:
    """phi_2·d1 − weight·phi_3·d2 (weight 2 is exact), d1 and d2 from divided differences."""
    phi_2 = math.expm1(-k) / k + 1
    (lam_0, x_0), (lam_1, x_1) = history[:2]
    r_0 = (lam_0 - lam_1) / h
    slope_0 = (x_0 - x_1) / r_0
    if len(history) == 2:
        return phi_2 * slope_0
    lam_2, x_2 = history[2]
    r_1 = (lam_1 - lam_2) / h
    second = (slope_0 - (x_1 - x_2) / r_1) / (r_0 + r_1)
    return phi_2 * (slope_0 + second * r_0) - weight * (phi_2 / k - 0.5) * second
