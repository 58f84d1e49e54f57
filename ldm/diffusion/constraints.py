"""Constraints on x0: wrappers of a DenoiseFn that keep its estimate in range or equal to known values.

Each wrapper replaces x0 and derives eps again, eps = (x_t − alpha·x0)/sigma, so x_t = alpha·x0 + sigma·eps
still holds and every sampler can use the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.diffusion.schedule import NoiseSchedule, broadcast


def with_x0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x0: Tensor, like: Denoised) -> Denoised:
    """Return a prediction with another x0 and the eps that follows from it.

    Args:
        schedule: The noise schedule.
        x_t: The state, shape (B, *S).
        t: Its timestep, shape () or (B,).
        x0: The new estimate of clean data, shape (B, *S).
        like: The prediction to replace; its `var_frac` is kept.
    """
    alpha, sigma = schedule.alpha_sigma_like(t, x0)
    return like._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)


def with_eps(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, eps: Tensor, like: Denoised) -> Denoised:
    """Return a prediction with another eps and the x0 that follows from it.

    Args:
        schedule: The noise schedule.
        x_t: The state, shape (B, *S).
        t: Its timestep, shape () or (B,).
        eps: The new estimate of the noise, shape (B, *S).
        like: The prediction to replace; its `var_frac` is kept.

    Raises:
        ValueError: At alpha 0, where x0 does not follow from eps.
    """
    alpha, sigma = schedule.alpha_sigma_like(t, eps)
    if not bool((alpha > 0).all()):
        raise ValueError(
            "guidance of eps is not defined at alpha 0 (zero terminal SNR): start one step later, or guide x0"
        )
    return like._replace(x0=(x_t - sigma * eps) / alpha, eps=eps)


def clip_x0(denoise: DenoiseFn, schedule: NoiseSchedule, limit: float = 1.0) -> DenoiseFn:
    """Return the denoiser with x0 clamped to [−limit, limit]; `limit` is positive, 1 by default."""
    if limit <= 0:
        raise ValueError(f"limit must be positive, got {limit}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        return with_x0(schedule, x_t, t, d.x0.clamp(-limit, limit), d)

    return fn


def dynamic_threshold(
    denoise: DenoiseFn, schedule: NoiseSchedule, quantile: float = 0.995, *, most: float | None = None
) -> DenoiseFn:
    """Return the denoiser with x0 clamped to [−s, s] and divided by s, s = max(1, a quantile of |x0|).

    Source: Imagen (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    Args:
        denoise: The denoiser.
        schedule: Its noise schedule.
        quantile: The quantile of each sample's |x0|, in (0, 1]. Default: 0.995.
        most: Upper bound of s, at least 1; None for no bound. Default: None.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
    if most is not None and most < 1:
        raise ValueError(f"most must be at least 1, got {most}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        quantiles = torch.stack([_quantile(sample.abs().flatten(), quantile) for sample in d.x0])  # (B,)
        s = broadcast(quantiles.clamp(min=1, max=most), d.x0)
        return with_x0(schedule, x_t, t, d.x0.clamp(-s, s) / s, d)

    return fn


def _quantile(values: Tensor, q: float) -> Tensor:
    """Return the q-quantile of values (n,), interpolated linearly; torch.quantile takes at most 2**24."""
    position = q * (len(values) - 1)
    low = int(position)
    ordered = values.sort().values
    return ordered[low].lerp(ordered[min(low + 1, len(values) - 1)], position - low)


def keep_known(denoise: DenoiseFn, schedule: NoiseSchedule, known: Tensor, mask: Tensor) -> DenoiseFn:
    """Return the denoiser with x0 replaced by known values where the mask is 0.

    As eps is derived again, every sampler carries the known region to `known` noised to the level that its
    step arrives at, and to `known` itself at clean data.

    Args:
        denoise: The denoiser.
        schedule: Its noise schedule.
        known: The known values, shape (B or 1, C, h, w).
        mask: Weights in [0, 1], broadcast against x0: 1 keeps the estimate (repaint), 0 takes `known`.
    """

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        weight = mask.to(d.x0.device, d.x0.dtype)
        return with_x0(schedule, x_t, t, weight * d.x0 + (1 - weight) * known.to(d.x0.device, d.x0.dtype), d)

    return fn
