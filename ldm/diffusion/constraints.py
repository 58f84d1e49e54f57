"""Constraints on x0: what wraps a DenoiseFn to hold its prediction in bounds or to known values."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.diffusion.schedule import NoiseSchedule, broadcast


def with_x0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x0: Tensor, like: Denoised) -> Denoised:
    """The Denoised of a changed x0: eps is derived again, so that x_t = alpha·x0 + sigma·eps still holds."""
    alpha, sigma = (broadcast(value, x0) for value in schedule.alpha_sigma(t))
    return like._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)


def clip_x0(denoise: DenoiseFn, schedule: NoiseSchedule, limit: float = 1.0) -> DenoiseFn:
    """x0 clamped to [−limit, limit]."""
    if limit <= 0:
        raise ValueError(f"limit must be positive, got {limit}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        return with_x0(schedule, x_t, t, d.x0.clamp(-limit, limit), d)

    return fn


def dynamic_threshold(
    denoise: DenoiseFn, schedule: NoiseSchedule, quantile: float = 0.995, *, most: float | None = None
) -> DenoiseFn:
    """x0 clamped to ±s and divided by s, s = max(1, quantile of |x0|) of each sample  (Imagen,
    arXiv:2205.11487, section 2.3).

    ``most`` bounds s from above (None: nothing does).
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
    if most is not None and most < 1:
        raise ValueError(f"most must be at least 1, got {most}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        # (B,)
        s = torch.stack([_quantile(sample.abs().flatten(), quantile) for sample in d.x0]).clamp(
            min=1, max=most
        )
        s = broadcast(s, d.x0)
        return with_x0(schedule, x_t, t, d.x0.clamp(-s, s) / s, d)

    return fn


def _quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile with linear interpolation, for any number of values (torch.quantile stops at 2**24)."""
    position = q * (len(values) - 1)
    low = int(position)
    ordered = values.sort().values
    return ordered[low].lerp(ordered[min(low + 1, len(values) - 1)], position - low)


def keep_known(denoise: DenoiseFn, schedule: NoiseSchedule, known: Tensor, mask: Tensor) -> DenoiseFn:
    """x0 replaced by ``known`` (B or 1, C, h, w) where ``mask`` (broadcast against it, in [0, 1]) is 0; 1
    means repaint.

    With eps derived again, every sampler then carries the known region to ``known`` noised to the level that
    its step arrives at, and to ``known`` itself at clean data.
    """

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        weight = mask.to(d.x0.device, d.x0.dtype)
        return with_x0(schedule, x_t, t, weight * d.x0 + (1 - weight) * known.to(d.x0.device, d.x0.dtype), d)

    return fn
