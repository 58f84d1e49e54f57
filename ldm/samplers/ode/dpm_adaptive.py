"""DPM-Solver-12 and -23 with an error tolerance: each sample takes steps of its own length."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, states, toward


def dpm_adaptive(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    safety: float = 0.81,
    max_steps: int = 1000,
) -> Tensor:
    """DPM-Solver of ``order`` 2 or 3 with the embedded lower order as error estimate  (arXiv:2206.00927,
    algorithms 1–2, appendix C).

    Of the grid only the ends count: it goes from its first state to its last with noise, and a state of clean
    data is one first-order step on. The error is each sample's own, so that no image depends on its batch; an
    integral controller with an arctan limiter sets the next step in lambda. ``on_step`` is called after every
    attempt. Raises RuntimeError after ``max_steps`` attempts, ValueError for a grid from pure noise.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order}")
    alpha, sigma = states(grid)
    if alpha[0] == 0:
        raise ValueError("dpm_adaptive needs a finite lambda to start from; this grid starts at alpha 0")
    final = -2 if sigma[-1] == 0 else -1
    lam, end = (torch.full((len(x),), float(grid.lam[i]), dtype=torch.float64) for i in (0, final))
    step = torch.full_like(lam, h_init)
    y, before = x / alpha[0], x / alpha[0]
    attempts, stop = 0, False
    while bool((lam < end).any()) and not stop:
        if attempts == max_steps:
            raise RuntimeError(
                f"dpm_adaptive made {max_steps} attempts and stands at lambda {lam.tolist()}: loosen rtol or"
                " atol"
            )
        # a sample that has arrived is computed along, and left as it is
        start = torch.minimum(lam, end - 1e-3)
        target = torch.minimum(start + step, end)
        low, high, d = _attempt(denoise, y, grid, start, target, order)
        tolerance = torch.clamp(rtol * torch.maximum(low.abs(), before.abs()), min=atol)
        error = ((low - high) / tolerance).flatten(1).square().mean(1).sqrt().to("cpu", torch.float64)  # (B,)
        factor = 1 + torch.atan((1 / (error + 1e-8)) ** (1 / order) - 1)
        accept = (factor >= safety) & (lam < end)
        before = torch.where(_wide(accept, y), low, before)
        y = torch.where(_wide(accept, y), high, y)
        lam = torch.where(accept, target, lam)
        step = step * factor
        x, stop = after(on_step, attempts, _wide(torch.sigmoid(2 * lam).sqrt(), y) * y, d)
        y = y if on_step is None else x / _wide(torch.sigmoid(2 * lam).sqrt(), y)
        attempts += 1
    if final == -2 and not stop:
        d = denoise(x, grid.t[-1])
        x, _ = after(on_step, attempts, toward(x, d.x0, sigma[-2], sigma[-2] / alpha[-2], alpha[-1], 0.0), d)
    return x


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …, 1) beside ``like``; a bool stays one."""
    return value.to(like.device, None if value.dtype == torch.bool else like.dtype).reshape(
        -1, *[1] * (like.ndim - 1)
    )


def _attempt(
    denoise: DenoiseFn, y: Tensor, grid: TimeGrid, lam: Tensor, target: Tensor, order: int
) -> tuple[Tensor, Tensor, Denoised]:
    """The lower and the higher order's y = x/alpha at ``target``, (B, *S) from y at ``lam``, both (B,)."""
    h = target - lam

    def evaluate(y: Tensor, at: Tensor) -> Denoised:
        return denoise(_wide(torch.sigmoid(2 * at).sqrt(), y) * y, grid.time(-at))

    def gain(
        fraction: float,
    ) -> tuple[Tensor, Tensor]:  # sigma/alpha at the inner level, times e^(r·h) − 1; and phi of it
        z = fraction * h
        return _wide(torch.exp(-(lam + z)) * torch.expm1(z), y), _wide(
            torch.exp(-(lam + z)) * (torch.expm1(z) / z - 1), y
        )

    d = evaluate(y, lam)
    whole, whole_phi = gain(1.0)
    if order == 2:
        half, _ = gain(0.5)
        inner = evaluate(y - half * d.eps, lam + h / 2).eps
        low = y - whole * d.eps
        return low, low - whole * (inner - d.eps), d
    third, _ = gain(1 / 3)
    two_thirds, two_thirds_phi = gain(2 / 3)
    first = evaluate(y - third * d.eps, lam + h / 3).eps
    second = evaluate(y - two_thirds * d.eps - 2 * two_thirds_phi * (first - d.eps), lam + 2 * h / 3).eps
    base = y - whole * d.eps
    # the embedded second order: U = base − (e^h − 1)/(2·r1)·(eps_1 − eps), r1 = 1/3
    return base - 1.5 * whole * (first - d.eps), base - 1.5 * whole_phi * (second - d.eps), d
