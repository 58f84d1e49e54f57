"""What the samplers share: coefficients as numbers, first-order steps, adding noise, checks of arguments.

Notation of all samplers: x = alpha·x0 + sigma·eps is the state, and a prime marks the next one. In

    y = x/alpha,   rho = sigma/alpha,   lambda = log(alpha/sigma) = −log rho,   h = lambda' − lambda

the probability-flow ODE is dy/d rho = eps (Song et al. 2021, arXiv:2010.02502, eq. 14; Karras et al. 2022,
arXiv:2206.00364, eq. 3), whose solution is y' = y + (rho' − rho)·eps where eps is constant. Clean data has
rho = 0 and lambda = +inf, pure noise (zero terminal SNR) rho = inf and lambda = −inf.

Coefficients are Python floats: they multiply tensors of any dtype, and are themselves computed in float64.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, NoiseFn, OnStep


def alphas_sigmas(grid: TimeGrid) -> tuple[list[float], list[float]]:
    """Return alpha and sigma of the N + 1 states of a grid."""
    return grid.alpha.tolist(), grid.sigma.tolist()


def noise_ratio(alpha: float, sigma: float) -> float:
    """Return rho = sigma/alpha, the noise level of x/alpha; inf at pure noise."""
    return sigma / alpha if alpha > 0 else math.inf


def half_log_snr(alpha: float, sigma: float) -> float:
    """Return lambda = log(alpha/sigma); +inf at clean data, −inf at pure noise."""
    if sigma == 0:
        return math.inf
    return math.log(alpha / sigma) if alpha > 0 else -math.inf


def half_log_snrs(grid: TimeGrid) -> list[float]:
    """Return lambda of the N + 1 states of a grid."""
    return [half_log_snr(a, s) for a, s in zip(*alphas_sigmas(grid), strict=True)]


def state_of_ratio(rho: float) -> tuple[float, float]:
    """Return alpha and sigma of a finite noise level rho = sigma/alpha, with alpha² + sigma² = 1."""
    alpha = 1 / math.sqrt(1 + rho**2)
    return alpha, rho * alpha


def step_const_x0(
    x: Tensor, x0: Tensor, sigma: float, rho: float, alpha_next: float, rho_next: float
) -> Tensor:
    """Return the exact step for a constant x0: y' = (rho'/rho)·y + (1 − rho'/rho)·x0.

    In half log-SNR this is x' = (sigma'/sigma)·x − alpha'·(e^(−h) − 1)·x0 (Lu et al. 2022, arXiv:2211.01095,
    eq. 12). It equals `step_const_eps` up to rounding, and is defined at pure noise too.

    Args:
        x: The state, shape (B, *S).
        x0: The estimate of clean data, shape (B, *S).
        sigma: sigma of the state.
        rho: sigma/alpha of the state, may be inf.
        alpha_next: alpha of the next state.
        rho_next: sigma/alpha of the next state.
    """
    return alpha_next * (rho_next / sigma) * x + alpha_next * (1 - rho_next / rho) * x0


def step_const_eps(
    x: Tensor, eps: Tensor, alpha: float, rho: float, alpha_next: float, rho_next: float
) -> Tensor:
    """Return the exact step for a constant eps: y' = y + (rho' − rho)·eps (arXiv:2206.00364, eq. 3).

    Args:
        x: The state, shape (B, *S).
        eps: The estimate of the noise, shape (B, *S).
        alpha: alpha of the state, positive.
        rho: sigma/alpha of the state.
        alpha_next: alpha of the next state.
        rho_next: sigma/alpha of the next state.
    """
    return alpha_next / alpha * x + alpha_next * (rho_next - rho) * eps


def ancestral_split(rho: float, rho_next: float, eta: float) -> tuple[float, float]:
    """Return (rho_down, rho_up), rho_down² + rho_up² = rho'²: step down to rho_down, then add noise rho_up.

    With eta = 1 the added noise has the variance of DDPM's posterior, with eta = 0 there is none.
    """
    up = min(rho_next, eta * rho_next * math.sqrt(1 - (rho_next / rho) ** 2))
    return math.sqrt(rho_next**2 - up**2), up


def renoise(x: Tensor, z: Tensor, alpha: float, sigma: float, alpha_up: float, sigma_up: float) -> Tensor:
    """Return the state noised from (alpha, sigma) to a noisier level: a·x + sqrt(sigma_up² − (a·sigma)²)·z.

    a = alpha_up/alpha. This is a draw of q(x_up | x), the forward process between two levels.

    Args:
        x: The state, shape (B, *S).
        z: Standard normal noise, shape (B, *S).
        alpha: alpha of the state, positive.
        sigma: sigma of the state.
        alpha_up: alpha of the noisier level.
        sigma_up: sigma of the noisier level.
    """
    a = alpha_up / alpha
    return a * x + math.sqrt(sigma_up**2 - (a * sigma) ** 2) * z


def renoise_ratio(
    x: Tensor, z: Tensor, alpha: float, rho: float, rho_up: float, s_noise: float = 1.0
) -> Tensor:
    """Return the state noised from rho to rho_up: y_up = y + s_noise·sqrt(rho_up² − rho²)·z, y = x/alpha.

    Args:
        x: The state, shape (B, *S).
        z: Standard normal noise, shape (B, *S).
        alpha: alpha of the state, positive.
        rho: sigma/alpha of the state.
        rho_up: The noisier level, finite.
        s_noise: Factor of the noise's standard deviation. Default: 1.
    """
    alpha_up, _ = state_of_ratio(rho_up)
    return alpha_up * (x / alpha + s_noise * math.sqrt(rho_up**2 - rho**2) * z)


def call_on_step(on_step: OnStep | None, i: int, x: Tensor, d: Denoised) -> tuple[Tensor, bool]:
    """Call the hook after step i; return the state it leaves and whether it ended the run.

    Args:
        on_step: The hook; None leaves the state as it is.
        i: Index of the step.
        x: The state after it, shape (B, *S).
        d: The prediction that it used.
    """
    if on_step is None:
        return x, False
    try:
        changed = on_step(i, x, d)
    except StopIteration:
        return x, True
    return (x if changed is None else changed), False


def require_noise(noise: NoiseFn | None, sampler: str) -> NoiseFn:
    """Return the noise source; raise ValueError if there is none."""
    if noise is None:
        raise ValueError(
            f"{sampler} draws noise at its steps: give noise, e.g. ldm.diffusion.noise.keyed_noise(seeds)"
        )
    return noise


def check_choice(value: str, choices: tuple[str, ...], what: str) -> None:
    """Raise ValueError unless `value` is among the choices."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choices: {', '.join(choices)}")


def check_range(value: float, low: float, high: float, what: str) -> None:
    """Raise ValueError unless low <= value <= high; `what` is the name of the value."""
    if not low <= value <= high:
        raise ValueError(f"{what} must lie in [{low}, {high}], got {value}")
