"""DPM-Solver++(3M) SDE: x0 as a parabola in lambda through three evaluations; third order for eta = 0.

With lambda = log(alpha/sigma), h = lambda' − lambda, k = (1 + eta)·h and s the position in the step, from 0
to 1, the last three estimates of x0 give the parabola x0 + d1·s + d2·s², which is integrated exactly:

    x' = (sigma'/sigma)·e^(−eta·h)·x + alpha'·(1 − e^(−k))·x0 + alpha'·(phi_2·d1 − 2·phi_3·d2)
         + sigma'·sqrt(1 − e^(−2·eta·h))·z
    phi_2 = (e^(−k) − 1)/k + 1,   phi_3 = phi_2/k − 1/2

The published code and its ports weigh d2 by phi_3, half of its integral, which makes the method second order;
`curvature="published"` reproduces them. The first step is of order 1, the second of order 2. A step to clean
data or from pure noise is of order 1, and estimates before pure noise are not used.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, check_choice, half_log_snrs, require_noise


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
    """Sample with DPM-Solver++(3M) SDE, one evaluation per step.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: The noise source, required if eta > 0; draw i is that of step i. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        eta: Amount of noise added per step, at least 0; 0 is deterministic, 1 the reverse SDE. Default: 1.
        s_noise: Factor of the noise's standard deviation. Default: 1.
        curvature: Weight of d2: "exact", or "published" for half of it. Default: "exact".

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If eta is negative, the curvature is unknown, or noise is missing while eta > 0.
    """
    check_choice(curvature, ("exact", "published"), "curvature")
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    draw = require_noise(noise, "dpmpp_3m_sde") if eta > 0 else None
    (alpha, sigma), lam = alphas_sigmas(grid), half_log_snrs(grid)
    history: list[tuple[float, Tensor]] = []  # (lambda, x0) of finite lambda, newest first
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        h = lam[i + 1] - lam[i]
        k = (1 + eta) * h
        decay = math.exp(-eta * h) if eta else 1.0
        x = sigma[i + 1] / sigma[i] * decay * x - alpha[i + 1] * math.expm1(-k) * d.x0
        if math.isfinite(lam[i]):
            history = [(lam[i], d.x0), *history][:3]
        if math.isfinite(h) and len(history) > 1:
            x = x + alpha[i + 1] * _higher_orders(history, h, k, 2.0 if curvature == "exact" else 1.0)
        if draw is not None and sigma[i + 1] > 0:
            x = x + sigma[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise * draw(i, x)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x


def _higher_orders(history: list[tuple[float, Tensor]], h: float, k: float, weight: float) -> Tensor:
    """Return phi_2·d1 − weight·phi_3·d2, with d1 and d2 from divided differences.

    Args:
        history: Two or three pairs (lambda, x0), newest first; with two of them d2 is 0.
        h: The step in lambda.
        k: (1 + eta)·h.
        weight: Weight of phi_3·d2; 2 is exact.
    """
    phi_2 = math.expm1(-k) / k + 1
    (lam_0, x_0), (lam_1, x_1) = history[:2]
    r_0 = (lam_0 - lam_1) / h
    slope_0 = (x_0 - x_1) / r_0
    if len(history) == 2:
        return phi_2 * slope_0
    lam_2, x_2 = history[2]
    r_1 = (lam_1 - lam_2) / h
    d2 = (slope_0 - (x_1 - x_2) / r_1) / (r_0 + r_1)
    return phi_2 * (slope_0 + d2 * r_0) - weight * (phi_2 / k - 0.5) * d2
