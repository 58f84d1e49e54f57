"""Guidance: what makes a DenoiseFn, and what wraps one. All of it composes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import with_x0
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.diffusion.prediction import denoised, target
from ldm.diffusion.schedule import NoiseSchedule, broadcast


def cfg(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> DenoiseFn:
    """Classifier-free guidance: x0 = x0_uncond + scale·(x0_cond − x0_uncond), and eps alike
    (arXiv:2207.12598, eq. 6, with scale = 1 + w).

    Scale 1 is the conditional model at its own cost, scale 0 the unconditional; else both go through the
    network in one batch where their shapes allow. ``rescale`` in [0, 1] brings the per-sample deviation of
    the prediction back to the conditional one's (arXiv:2305.08891, eq. 15–16). ``interval`` (low, high] of
    sigma/alpha guides there alone, and is conditional elsewhere (arXiv:2404.07724). The learned variance is
    the conditional branch's.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1], got {rescale}")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval must be (low, high) of sigma/alpha with 0 <= low < high, got {interval}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        inside = _inside(denoiser.schedule, t, interval)
        if scale == 1 or not bool(inside.any()):
            return denoiser(x_t, t, cond)
        if scale == 0 and bool(inside.all()):
            return denoiser(x_t, t, uncond)
        with_cond, without = both(denoiser, x_t, t, cond, uncond)
        weight = scale if bool(inside.all()) else broadcast(torch.where(inside, scale, 1.0), with_cond.x0)
        guided = lerp(without, with_cond, weight)._replace(var_frac=with_cond.var_frac)
        return _rescale(denoiser, x_t, t, guided, with_cond, rescale) if rescale else guided

    return fn


def both(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond) -> tuple[Denoised, Denoised]:
    """The denoiser under two conditions, each (B, *S): one batch of 2B where the conditions can be joined,
    else two calls."""
    first, second = under(denoiser, x_t, t, [cond, uncond])
    return first, second


def under(denoiser: Denoiser, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> list[Denoised]:
    """The denoiser under K conditions, each (B, *S): one batch of K·B where the conditions can be joined,
    else K calls."""
    n, k = len(x_t), len(conds)
    learned = torch.is_grad_enabled() and any(
        value.requires_grad for cond in conds for _, value in cond.items()
    )
    join = joined_conditions.__wrapped__ if learned else joined_conditions  # a graph serves one backward pass
    whole = None if k == 1 else join(tuple(conds), n, x_t.device, denoiser.dtype)
    if whole is None:
        return [denoiser(x_t, t, cond) for cond in conds]
    t = torch.as_tensor(t)
    t = torch.cat([t] * k) if t.ndim == 1 and len(t) == n else t  # (K·B,) or shared
    result = denoiser(torch.cat([x_t] * k), t, whole)
    parts = [[None] * k if value is None else value.chunk(k) for value in result]
    return [Denoised(*(part[i] for part in parts)) for i in range(k)]


@lru_cache(maxsize=4)
def joined_conditions(
    conds: tuple[Cond, ...], n: int, device: torch.device, dtype: torch.dtype | None
) -> Cond | None:
    """Conditions as one of batch K·n, where a network computes; None if they cannot be joined.

    The same conditions give the very same tensors at every step, so that a network may keep what it derives
    from them.
    """
    wide = [cond.expand(n) for cond in conds]
    return Cond.cat(wide).to(device, dtype) if Cond.can_cat(wide) else None


def lerp(a: Denoised, b: Denoised, weight: float | Tensor) -> Denoised:
    """a + weight·(b − a) in x0 and eps: the same straight line, as both are affine in each other at one
    x_t."""
    return Denoised(a.x0 + weight * (b.x0 - a.x0), a.eps + weight * (b.eps - a.eps))


def _inside(schedule: NoiseSchedule, t: Tensor, interval: tuple[float, float] | None) -> Tensor:
    """Whether each t lies in the interval, (1,) or (B,) bool on the CPU."""
    if interval is None:
        return torch.ones(1, dtype=torch.bool)
    alpha, sigma = schedule.alpha_sigma(torch.as_tensor(t).reshape(-1).cpu())
    return (interval[0] < sigma / alpha) & (sigma / alpha <= interval[1])


def _rescale(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, guided: Denoised, cond: Denoised, amount: float
) -> Denoised:
    """The guided prediction with its per-sample deviation drawn towards the conditional one's, in the
    network's own prediction type."""
    x_t = x_t.to(guided.x0.dtype)
    alpha, sigma = (broadcast(value, x_t) for value in denoiser.schedule.alpha_sigma(t))
    raw = target(guided.x0, guided.eps, alpha, sigma, denoiser.prediction)
    reference = target(cond.x0, cond.eps, alpha, sigma, denoiser.prediction)
    dims = list(range(1, raw.ndim))
    raw_rescaled = raw * (reference.std(dims, keepdim=True) / raw.std(dims, keepdim=True))
    raw = amount * raw_rescaled + (1 - amount) * raw
    return denoised(raw, x_t, alpha, sigma, denoiser.prediction)._replace(var_frac=guided.var_frac)


def compose(denoiser: Denoiser, prompts: Sequence[tuple[Cond, float]], uncond: Cond) -> DenoiseFn:
    """Several conditions with weights: eps_u + sum_i w_i·(eps_i − eps_u)  (composable diffusion,
    arXiv:2206.01714, eq. 11).

    One condition of weight w is ``cfg`` with scale w; a negative weight turns away from its condition. What
    has no weight is not evaluated: the unconditional where the weights sum to 1, a condition where its weight
    is 0.
    """
    if not prompts:
        raise ValueError("compose needs at least one (condition, weight)")
    rest = 1 - math.fsum(weight for _, weight in prompts)  # the sum above, with eps_u gathered
    terms = [(cond, weight) for cond, weight in [*prompts, (uncond, rest)] if weight != 0]

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        parts = under(denoiser, x_t, t, [cond for cond, _ in terms])
        x0, eps = terms[0][1] * parts[0].x0, terms[0][1] * parts[0].eps
        for part, (_, weight) in zip(parts[1:], terms[1:], strict=True):
            x0, eps = x0 + weight * part.x0, eps + weight * part.eps
        return Denoised(x0, eps, parts[0].var_frac)

    return fn


def perp_neg(
    denoiser: Denoiser, cond: Cond, negatives: Sequence[tuple[Cond, float]], uncond: Cond, scale: float
) -> DenoiseFn:
    """eps_u + scale·(p − sum_i w_i·n_i⊥), p and n_i the differences from eps_u, n_i⊥ the part of n_i across p
    (arXiv:2304.04968, eq. 8).

    Without negatives it is ``cfg``; scale 0 is the unconditional model at one evaluation.
    """
    terms = [(negative, weight) for negative, weight in negatives if weight != 0]
    plain = cfg(denoiser, cond, uncond, scale)

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 0 or not terms:
            return plain(x_t, t)
        positive, *others, base = under(
            denoiser, x_t, t, [cond, *(negative for negative, _ in terms), uncond]
        )
        p = positive.x0 - base.x0
        # n − (share of p)·p, where the share is the same for x0 and eps, whose differences are parallel; x0's
        # are defined at alpha 0 too
        along, x0, eps = 1.0, base.x0, base.eps
        for other, (_, weight) in zip(others, terms, strict=True):
            share = broadcast(_share(other.x0 - base.x0, p), p)
            along = along + weight * share
            x0, eps = (
                x0 - scale * weight * (other.x0 - base.x0),
                eps - scale * weight * (other.eps - base.eps),
            )
        x0, eps = x0 + scale * along * p, eps + scale * along * (positive.eps - base.eps)
        return Denoised(x0, eps, positive.var_frac)

    return fn


def apg(
    denoiser: Denoiser, cond: Cond, uncond: Cond, scale: float, *, eta: float = 0.0, norm: float | None = None
) -> DenoiseFn:
    """Adaptive projected guidance: x0_c + (scale − 1)·(d⊥ + eta·d∥), d = x0_c − x0_u split along x0_c
    (arXiv:2410.02416, algorithm 1).

    ``norm`` bounds the length of each sample's d first. eta 1 without norm is ``cfg``; scale 1 is the
    conditional model at one evaluation. The paper's momentum is left out: it would be a memory between steps,
    which a DenoiseFn does not have.
    """

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 1:
            return denoiser(x_t, t, cond)
        with_cond, without = both(denoiser, x_t, t, cond, uncond)
        d = with_cond.x0 - without.x0
        if norm is not None:
            length = d.flatten(1).norm(dim=1)
            d = d * broadcast((norm / length.clamp(min=1e-12)).clamp(max=1), d)
        across = _across(d, with_cond.x0)
        return with_x0(
            denoiser.schedule, x_t, t, with_cond.x0 + (scale - 1) * (across + eta * (d - across)), with_cond
        )

    return fn


def _across(a: Tensor, b: Tensor) -> Tensor:
    """The part of a orthogonal to b, sample by sample."""
    return a - broadcast(_share(a, b), a) * b


def _share(a: Tensor, b: Tensor) -> Tensor:
    """How much of b is in a, <a, b>/<b, b> of each sample, (B,)."""
    return (a * b).flatten(1).sum(1) / b.flatten(1).square().sum(1).clamp(min=1e-30)


def autoguidance(good: DenoiseFn, bad: DenoiseFn, scale: float) -> DenoiseFn:
    """bad + scale·(good − bad), ``bad`` being a smaller or less trained model of the same task
    (arXiv:2406.02507, eq. 3).

    Scale 1 evaluates ``good`` alone, scale 0 ``bad`` alone.
    """

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 0:
            return bad(x_t, t)
        d = good(x_t, t)
        return d if scale == 1 else lerp(bad(x_t, t), d, scale)._replace(var_frac=d.var_frac)

    return fn


def between(
    guided: DenoiseFn, plain: DenoiseFn, schedule: NoiseSchedule, low: float, high: float
) -> DenoiseFn:
    """``guided`` where low < sigma/alpha <= high, each sample by its own t, and ``plain`` elsewhere
    (arXiv:2404.07724, eq. 5).

    The interval of ``cfg`` for every other guidance; only what some sample needs is evaluated.
    """
    if not 0 <= low < high:
        raise ValueError(f"expected 0 <= low < high of sigma/alpha, got {low} and {high}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        inside = _inside(schedule, t, (low, high))
        if bool(inside.all()):
            return guided(x_t, t)
        if not bool(inside.any()):
            return plain(x_t, t)
        a, b = guided(x_t, t), plain(x_t, t)
        chosen = broadcast(inside, a.x0).bool()
        var = (
            None if a.var_frac is None or b.var_frac is None else torch.where(chosen, a.var_frac, b.var_frac)
        )
        return Denoised(torch.where(chosen, a.x0, b.x0), torch.where(chosen, a.eps, b.eps), var)

    return fn


def gradient(
    denoise: DenoiseFn,
    schedule: NoiseSchedule,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    scale: float = 1.0,
    *,
    of_x0: bool = False,
) -> DenoiseFn:
    """eps − scale·sigma·∇ log p(y | x_t): classifier guidance (arXiv:2105.05233, algorithm 2), by autograd.

    ``log_prob(x_t, t) -> (B,)`` sees the noisy state; with ``of_x0`` it sees the network's x0 and the
    gradient goes through the network, as for CLIP and reconstruction guidance (arXiv:2209.14687). Scale 0 is
    ``denoise`` alone. Raises ValueError at alpha 0, where a change of eps moves x0 without bound.
    """

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 0:
            return denoise(x_t, t)
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            d = denoise(x, t)
            (slope,) = torch.autograd.grad(log_prob(d.x0 if of_x0 else x, t).sum(), x)
        _, sigma = (broadcast(value, slope) for value in schedule.alpha_sigma(t))
        d = Denoised(*(None if value is None else value.detach() for value in d))
        return with_eps(schedule, x_t, t, d.eps - scale * sigma * slope, d)

    return fn


def with_eps(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, eps: Tensor, like: Denoised) -> Denoised:
    """The Denoised of a changed eps, x0 derived again; ValueError at alpha 0."""
    alpha, sigma = (broadcast(value, eps) for value in schedule.alpha_sigma(t))
    if not bool((alpha > 0).all()):
        raise ValueError(
            "guidance of eps is not defined at alpha 0 (zero terminal SNR): start one step later, or guide x0"
        )
    return like._replace(x0=(x_t - sigma * eps) / alpha, eps=eps)


def switch(first: DenoiseFn, second: DenoiseFn, below: float) -> DenoiseFn:
    """``first`` while t >= below, then ``second``: another network, or other guidance, for the last steps."""

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        times = torch.as_tensor(t).reshape(-1)
        if not bool((times == times[0]).all()):
            raise ValueError("switch needs one t for the whole batch")
        return (second if float(times[0]) < below else first)(x_t, t)

    return fn
