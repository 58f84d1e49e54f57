"""Guidance: functions that build a DenoiseFn from predictions under several conditions, models or gradients.

With eps_c and eps_u the predictions with and without a condition c, guided sampling follows the score of
p(x_t)·p(c | x_t)^w instead of p(x_t | c); for classifier-free guidance (Ho and Salimans 2022,
arXiv:2207.12598, eq. 6) this is

    eps = eps_u + scale·(eps_c − eps_u),   scale = 1 + w

At one x_t, x0 and eps are affine in each other with coefficients that do not depend on the condition, so the
same combination holds for x0, which is defined at alpha 0 too. Every function returns a DenoiseFn, so they
compose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import with_eps, with_x0
from ldm.diffusion.denoiser import Denoiser, denoise_both, denoise_each, denoised
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.diffusion.prediction import target
from ldm.diffusion.schedule import NoiseSchedule, broadcast
from ldm.support.defaults import as_tensor
from ldm.support.scalars import check_finite


def cfg(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> DenoiseFn:
    """Return classifier-free guidance, x0 = x0_u + scale·(x0_c − x0_u) (arXiv:2207.12598, eq. 6).

    Args:
        denoiser: The denoiser.
        cond: The condition, of batch size 1 or B.
        uncond: The condition of guidance's other side: unconditional, or a negative prompt.
        scale: 1 + w. Scale 1 evaluates the conditional model only, scale 0 the unconditional one only;
            otherwise both run in one batch where their shapes allow it.
        rescale: Fraction in [0, 1] by which the per-sample standard deviation of the prediction is brought
            back to that of the conditional one (arXiv:2305.08891, eq. 15–16). Default: 0.
        interval: (low, high] of sigma/alpha in which guidance applies; elsewhere the model is conditional
            (Kynkäänniemi et al. 2024, arXiv:2404.07724). Default: None, everywhere.

    Returns:
        The guided denoiser. Its learned variance is the conditional one.
    """
    check_finite(scale=scale)
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
        with_cond, without = denoise_both(denoiser, x_t, t, cond, uncond)
        weight = scale if bool(inside.all()) else broadcast(torch.where(inside, scale, 1.0), with_cond.x0)
        guided = lerp(without, with_cond, weight)._replace(var_frac=with_cond.var_frac)
        return _rescale(denoiser, x_t, t, guided, with_cond, rescale) if rescale else guided

    return fn


def lerp(a: Denoised, b: Denoised, weight: float | Tensor) -> Denoised:
    """Return a + weight·(b − a) in x0 and eps; the weight is a number or broadcasts against x0."""
    return Denoised(a.x0 + weight * (b.x0 - a.x0), a.eps + weight * (b.eps - a.eps))


def _inside(schedule: NoiseSchedule, t: Tensor, interval: tuple[float, float] | None) -> Tensor:
    """Return whether each t lies in an interval of sigma/alpha, (1,) or (B,) bool on the CPU."""
    if interval is None:
        return torch.ones(1, dtype=torch.bool, device="cpu")
    alpha, sigma = schedule.alpha_sigma(as_tensor(t).reshape(-1).cpu())
    return (interval[0] < sigma / alpha) & (sigma / alpha <= interval[1])


def _rescale(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, guided: Denoised, cond: Denoised, amount: float
) -> Denoised:
    """Return the guided prediction with its standard deviation moved towards the conditional one's."""
    x_t = x_t.to(guided.x0.dtype)
    alpha, sigma = denoiser.schedule.alpha_sigma_like(t, x_t)
    raw = target(guided.x0, guided.eps, alpha, sigma, denoiser.prediction)
    reference = target(cond.x0, cond.eps, alpha, sigma, denoiser.prediction)
    dims = list(range(1, raw.ndim))
    raw_rescaled = raw * (reference.std(dims, keepdim=True) / raw.std(dims, keepdim=True))
    raw = amount * raw_rescaled + (1 - amount) * raw
    return denoised(raw, x_t, alpha, sigma, denoiser.prediction)._replace(var_frac=guided.var_frac)


def compose(denoiser: Denoiser, prompts: Sequence[tuple[Cond, float]], uncond: Cond) -> DenoiseFn:
    """Return eps_u + sum_i w_i·(eps_i − eps_u): several conditions, each with its own weight.

    Source: composable diffusion (Liu et al. 2022, arXiv:2206.01714, eq. 11).

    Args:
        denoiser: The denoiser.
        prompts: Pairs (condition, weight). One condition of weight w is `cfg` with scale w; a negative weight
            steers away from its condition.
        uncond: The unconditional condition. It is evaluated only if the weights do not sum to 1; a condition
            of weight 0 is not evaluated.
    """
    if not prompts:
        raise ValueError("compose needs at least one (condition, weight)")
    for _, weight in prompts:
        check_finite(weight=weight)
    rest = 1 - math.fsum(weight for _, weight in prompts)  # the weight of eps_u in the sum above
    terms = [(cond, weight) for cond, weight in [*prompts, (uncond, rest)] if weight != 0]

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        parts = denoise_each(denoiser, x_t, t, [cond for cond, _ in terms])
        x0, eps = terms[0][1] * parts[0].x0, terms[0][1] * parts[0].eps
        for part, (_, weight) in zip(parts[1:], terms[1:], strict=True):
            x0, eps = x0 + weight * part.x0, eps + weight * part.eps
        return Denoised(x0, eps, parts[0].var_frac)

    return fn


def perp_neg(
    denoiser: Denoiser, cond: Cond, negatives: Sequence[tuple[Cond, float]], uncond: Cond, scale: float
) -> DenoiseFn:
    """Return eps_u + scale·(p − sum_i w_i·n_i⊥): negative prompts that do not weaken the prompt.

    p = eps_c − eps_u and n_i = eps_i − eps_u; n_i⊥ is the component of n_i orthogonal to p. Source: Perp-Neg
    (Armandpour et al. 2023, arXiv:2304.04968, eq. 8).

    Args:
        denoiser: The denoiser.
        cond: The condition.
        negatives: Pairs (condition, weight). Without any this is `cfg`.
        uncond: The unconditional condition.
        scale: The guidance scale; 0 is the unconditional model at one evaluation.
    """
    for _, weight in negatives:
        check_finite(weight=weight)
    terms = [(negative, weight) for negative, weight in negatives if weight != 0]
    without_negatives = cfg(denoiser, cond, uncond, scale)

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 0 or not terms:
            return without_negatives(x_t, t)
        positive, *others, base = denoise_each(
            denoiser, x_t, t, [cond, *(negative for negative, _ in terms), uncond]
        )
        p = positive.x0 - base.x0
        # n⊥ = n − c·p with c = <n, p>/<p, p>; c is the same for x0 and eps, whose differences are parallel,
        # and is computed from x0, which is defined at alpha 0 too
        factor: float | Tensor = 1.0  # of p: 1 + sum_i w_i·c_i
        x0, eps = base.x0, base.eps
        for other, (_, weight) in zip(others, terms, strict=True):
            factor = factor + weight * broadcast(_projection(other.x0 - base.x0, p), p)
            x0 = x0 - scale * weight * (other.x0 - base.x0)
            eps = eps - scale * weight * (other.eps - base.eps)
        x0, eps = x0 + scale * factor * p, eps + scale * factor * (positive.eps - base.eps)
        return Denoised(x0, eps, positive.var_frac)

    return fn


def apg(
    denoiser: Denoiser, cond: Cond, uncond: Cond, scale: float, *, eta: float = 0.0, norm: float | None = None
) -> DenoiseFn:
    """Return adaptive projected guidance, x0_c + (scale − 1)·(d⊥ + eta·d∥), d = x0_c − x0_u split along x0_c.

    The parallel component d∥ mostly raises saturation. The paper's momentum is left out, as a DenoiseFn has
    no memory between steps. Source: Sadat et al. 2024, arXiv:2410.02416, algorithm 1.

    Args:
        denoiser: The denoiser.
        cond: The condition.
        uncond: The unconditional condition, or a negative prompt.
        scale: The guidance scale; 1 is the conditional model at one evaluation.
        eta: Weight of the parallel component; 1 without `norm` is `cfg`. Default: 0.
        norm: Upper bound of the L2 norm of each sample's d. Default: None, no bound.

    Raises:
        ValueError: If a number is not finite, or `norm` is negative.
    """
    check_finite(scale=scale, eta=eta, norm=norm)
    if norm is not None and norm < 0:
        raise ValueError(f"norm: expected at least 0, got {norm}")

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 1:
            return denoiser(x_t, t, cond)
        with_cond, without = denoise_both(denoiser, x_t, t, cond, uncond)
        d = with_cond.x0 - without.x0
        if norm is not None:
            length = d.flatten(1).norm(dim=1)  # (B,)
            d = d * broadcast((norm / length.clamp(min=1e-12)).clamp(max=1), d)
        orthogonal = d - broadcast(_projection(d, with_cond.x0), d) * with_cond.x0
        x0 = with_cond.x0 + (scale - 1) * (orthogonal + eta * (d - orthogonal))
        return with_x0(denoiser.schedule, x_t, t, x0, with_cond)

    return fn


def _projection(a: Tensor, b: Tensor) -> Tensor:
    """Return the coefficient <a, b>/<b, b> of a's projection on b, per sample, shape (B,)."""
    return (a * b).flatten(1).sum(1) / b.flatten(1).square().sum(1).clamp(min=1e-30)


def autoguidance(good: DenoiseFn, bad: DenoiseFn, scale: float) -> DenoiseFn:
    """Return bad + scale·(good − bad), where `bad` is a smaller or less trained model of the same task.

    Source: Karras et al. 2024, arXiv:2406.02507, eq. 3.

    Args:
        good: The better model.
        bad: The worse model.
        scale: The guidance scale; 1 evaluates `good` only, 0 `bad` only.
    """
    check_finite(scale=scale)

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 0:
            return bad(x_t, t)
        d = good(x_t, t)
        return d if scale == 1 else lerp(bad(x_t, t), d, scale)._replace(var_frac=d.var_frac)

    return fn


def between(
    guided: DenoiseFn, plain: DenoiseFn, schedule: NoiseSchedule, low: float, high: float
) -> DenoiseFn:
    """Return `guided` where low < sigma/alpha <= high, per sample, and `plain` elsewhere.

    This gives every kind of guidance the interval of `cfg`. A denoiser that no sample needs is not evaluated.
    Source: Kynkäänniemi et al. 2024, arXiv:2404.07724, eq. 5.

    Args:
        guided: The denoiser inside the interval.
        plain: The denoiser outside of it.
        schedule: The noise schedule.
        low: Lower end of sigma/alpha, at least 0, excluded.
        high: Upper end of sigma/alpha, included.
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
        var_frac = None
        if a.var_frac is not None and b.var_frac is not None:
            var_frac = torch.where(chosen, a.var_frac, b.var_frac)
        return Denoised(torch.where(chosen, a.x0, b.x0), torch.where(chosen, a.eps, b.eps), var_frac)

    return fn


def gradient(
    denoise: DenoiseFn,
    schedule: NoiseSchedule,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    scale: float = 1.0,
    *,
    of_x0: bool = False,
) -> DenoiseFn:
    """Return classifier guidance, eps − scale·sigma·∇_x log p(y | x_t), with the gradient by autograd.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233, algorithm 2.

    Args:
        denoise: The denoiser.
        schedule: Its noise schedule.
        log_prob: `(x, t) -> log p(y | x)` of each sample, shape (B,).
        scale: The guidance scale; 0 is `denoise` alone. Default: 1.
        of_x0: Whether `log_prob` gets the denoiser's x0 instead of x_t; the gradient then passes through the
            network, as in CLIP and reconstruction guidance (Chung et al. 2022, arXiv:2209.14687). Default:
            False.

    Raises:
        ValueError: If the scale is not finite, or when called at alpha 0, where x0 is not bounded by eps.
    """
    check_finite(scale=scale)

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        if scale == 0:
            return denoise(x_t, t)
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            d = denoise(x, t)
            (slope,) = torch.autograd.grad(log_prob(d.x0 if of_x0 else x, t).sum(), x)
        _, sigma = schedule.alpha_sigma_like(t, slope)
        var_frac = None if d.var_frac is None else d.var_frac.detach()
        d = Denoised(d.x0.detach(), d.eps.detach(), var_frac)
        return with_eps(schedule, x_t, t, d.eps - scale * sigma * slope, d)

    return fn


def switch(first: DenoiseFn, second: DenoiseFn, below: float) -> DenoiseFn:
    """Return `first` while t >= below and `second` after: another network or guidance for the last steps.

    Raises:
        ValueError: When called with different t in one batch.
    """
    check_finite(below=below)

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        times = as_tensor(t).reshape(-1)
        if not bool((times == times[0]).all()):
            raise ValueError("switch needs one t for the whole batch")
        return (second if float(times[0]) < below else first)(x_t, t)

    return fn
