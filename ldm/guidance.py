"""Guidance: what makes a DenoiseFn, and what wraps one. All of it composes."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.denoiser import Denoiser
from ldm.prediction import denoised, target
from ldm.schedule import NoiseSchedule, broadcast
from ldm.types import Cond, Denoised, DenoiseFn


def cfg(
    denoiser: Denoiser, cond: Cond, uncond: Cond, scale: float, *, rescale: float = 0.0, interval: tuple[float, float] | None = None
) -> DenoiseFn:
    """Classifier-free guidance: x0 = x0_uncond + scale·(x0_cond − x0_uncond), and eps alike  (arXiv:2207.12598, eq. 6, with scale = 1 + w).

    Scale 1 is the conditional model at its own cost, scale 0 the unconditional; else both go through the network in one batch where their
    shapes allow. ``rescale`` in [0, 1] brings the per-sample deviation of the prediction back to the conditional one's (arXiv:2305.08891,
    eq. 15–16). ``interval`` (low, high] of sigma/alpha guides there alone, and is conditional elsewhere (arXiv:2404.07724).
    The learned variance is the conditional branch's.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1], got {rescale}")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval must be (low, high) of sigma/alpha with 0 <= low < high, got {interval}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 1 or not _inside(denoiser.schedule, t, interval):
            return denoiser(x_t, t, cond)
        if scale == 0:
            return denoiser(x_t, t, uncond)
        with_cond, without = both(denoiser, x_t, t, cond, uncond)
        guided = lerp(without, with_cond, scale)._replace(var_frac=with_cond.var_frac)
        return _rescale(denoiser, x_t, t, guided, with_cond, rescale) if rescale else guided

    return fn


def both(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond) -> tuple[Denoised, Denoised]:
    """The denoiser under two conditions, each (B, *S): one batch of 2B where the conditions can be joined, else two calls."""
    n = len(x_t)
    pair = [cond.expand(n), uncond.expand(n)]
    if not Cond.can_cat(pair):
        return denoiser(x_t, t, cond), denoiser(x_t, t, uncond)
    t = torch.as_tensor(t)
    t = torch.cat([t, t]) if t.ndim == 1 and len(t) == n else t  # (2B,) or shared
    result = denoiser(torch.cat([x_t, x_t]), t, Cond.cat(pair))
    halves = [(None, None) if value is None else value.chunk(2) for value in result]
    return Denoised(*(half[0] for half in halves)), Denoised(*(half[1] for half in halves))


def lerp(a: Denoised, b: Denoised, weight: float | Tensor) -> Denoised:
    """a + weight·(b − a) in x0 and eps: the same straight line, as both are affine in each other at one x_t."""
    return Denoised(a.x0 + weight * (b.x0 - a.x0), a.eps + weight * (b.eps - a.eps))


def _inside(schedule: NoiseSchedule, t: Tensor, interval: tuple[float, float] | None) -> bool:
    if interval is None:
        return True
    alpha, sigma = schedule.alpha_sigma(torch.as_tensor(t).reshape(-1)[:1])
    return interval[0] < float(sigma / alpha) <= interval[1]


def _rescale(denoiser: Denoiser, x_t: Tensor, t: Tensor, guided: Denoised, cond: Denoised, amount: float) -> Denoised:
    """The guided prediction with its per-sample deviation drawn towards the conditional one's, in the network's own prediction type."""
    x_t = x_t.to(guided.x0.dtype)
    alpha, sigma = (broadcast(value, x_t) for value in denoiser.schedule.alpha_sigma(t))
    raw = target(guided.x0, guided.eps, alpha, sigma, denoiser.prediction)
    reference = target(cond.x0, cond.eps, alpha, sigma, denoiser.prediction)
    dims = list(range(1, raw.ndim))
    raw_rescaled = raw * (reference.std(dims, keepdim=True) / raw.std(dims, keepdim=True))
    raw = amount * raw_rescaled + (1 - amount) * raw
    return denoised(raw, x_t, alpha, sigma, denoiser.prediction)._replace(var_frac=guided.var_frac)


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


def dynamic_threshold(denoise: DenoiseFn, schedule: NoiseSchedule, quantile: float = 0.995, *, most: float | None = None) -> DenoiseFn:
    """x0 clamped to ±s and divided by s, s = max(1, quantile of |x0|) of each sample  (Imagen, arXiv:2205.11487, section 2.3).

    ``most`` bounds s from above (None: nothing does).
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
    if most is not None and most < 1:
        raise ValueError(f"most must be at least 1, got {most}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        s = torch.stack([_quantile(sample.abs().flatten(), quantile) for sample in d.x0]).clamp(min=1, max=most)  # (B,)
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
    """x0 replaced by ``known`` (B or 1, C, h, w) where ``mask`` (broadcast against it, in [0, 1]) is 0; 1 means repaint.

    With eps derived again, every sampler then carries the known region to ``known`` noised to the level that its step arrives at, and to
    ``known`` itself at clean data.
    """

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        weight = mask.to(d.x0.device, d.x0.dtype)
        return with_x0(schedule, x_t, t, weight * d.x0 + (1 - weight) * known.to(d.x0.device, d.x0.dtype), d)

    return fn


def switch(first: DenoiseFn, second: DenoiseFn, below: float) -> DenoiseFn:
    """``first`` while t >= below, then ``second``: another network, or other guidance, for the last steps."""

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        times = torch.as_tensor(t).reshape(-1)
        if not bool((times == times[0]).all()):
            raise ValueError("switch needs one t for the whole batch")
        return (second if float(times[0]) < below else first)(x_t, t)

    return fn
