"""A denoiser under several conditions, in one batch where the conditions can be joined."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.interfaces import Denoised


def denoise_both(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond
) -> tuple[Denoised, Denoised]:
    """Return the predictions of one state under two conditions; see `denoise_each`.

    Args:
        denoiser: The denoiser.
        x_t: The state, shape (B, *S).
        t: Its timestep, shape () or (B,).
        cond: The first condition, of batch size 1 or B.
        uncond: The second condition, of batch size 1 or B.
    """
    first, second = denoise_each(denoiser, x_t, t, [cond, uncond])
    return first, second


def denoise_each(denoiser: Denoiser, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> list[Denoised]:
    """Return the predictions of one state under K conditions.

    The network runs once on a batch of K·B where the conditions can be joined (`Cond.can_cat`), else K times.

    Args:
        denoiser: The denoiser.
        x_t: The state, shape (B, *S).
        t: Its timestep, shape () or (B,).
        conds: K conditions, each of batch size 1 or B.

    Returns:
        K predictions, whose tensors have the shape (B, *S).
    """
    n, k = len(x_t), len(conds)
    differentiable = torch.is_grad_enabled() and any(
        value.requires_grad for cond in conds for _, value in cond.items()
    )
    # a graph serves one backward pass, so differentiable conditions are joined again at every step
    join = joined_conditions.__wrapped__ if differentiable else joined_conditions
    joined = None if k == 1 else join(tuple(conds), n, x_t.device, denoiser.dtype)
    if joined is None:
        return [denoiser(x_t, t, cond) for cond in conds]
    t = torch.as_tensor(t)
    t = torch.cat([t] * k) if t.ndim == 1 and len(t) == n else t  # (K·B,) or shared
    result = denoiser(torch.cat([x_t] * k), t, joined)
    x0, eps = result.x0.chunk(k), result.eps.chunk(k)
    if result.var_frac is None:
        return [Denoised(x0[i], eps[i]) for i in range(k)]
    var_frac = result.var_frac.chunk(k)
    return [Denoised(x0[i], eps[i], var_frac[i]) for i in range(k)]


@lru_cache(maxsize=4)
def joined_conditions(
    conds: tuple[Cond, ...], n: int, device: torch.device, dtype: torch.dtype | None
) -> Cond | None:
    """Return K conditions as one of batch size K·n; None if they cannot be joined.

    The result is cached: the same conditions give the same tensor objects at every step, so a network can
    cache what it derives from them.

    Args:
        conds: K conditions, each of batch size 1 or n.
        n: The batch size of each.
        device: Device of the result.
        dtype: Dtype of its floating-point fields; None keeps theirs.
    """
    expanded = [cond.expand(n) for cond in conds]
    return Cond.cat(expanded).to(device, dtype) if Cond.can_cat(expanded) else None
