"""DPM-Solver-12 and -23 with adaptive steps (Lu et al. 2022, arXiv:2206.00927, algorithms 1–2, appendix C).

In lambda = log(alpha/sigma) and y = x/alpha, the methods of order 2 and 3 integrate

    y(lambda + h) = y − integral of rho(u)·eps(u) du,   rho(u) = e^(−u),   u from lambda to lambda + h

with eps expanded at one or two inner points. Each holds a method of one order less, and their difference
estimates the error, measured in units of max(atol, rtol·|y|). A step is accepted if the factor by which the
next step should change, 1 + arctan(error^(−1/order) − 1), is at least `safety`.

Every sample has its own steps, so an image does not depend on the others in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn, OnStep
from ldm.diffusion.schedule import alpha_sigma_of_level, broadcast
from ldm.samplers.common import alphas_sigmas, call_on_step, step_const_x0
from ldm.support.text import shown


class TooFewAttempts(ValueError, RuntimeError):
    """The tolerance is not reached in `max_steps` attempts."""


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
    """Sample with adaptive DPM-Solver-12 or -23 (Lu et al. 2022, appendix C).

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: Only its ends count: from the first state to the last one with noise. Clean data is reached from
            there by one first-order step.
        noise: Not used. Default: None.
        on_step: Called after each attempt; see `ldm.diffusion.interfaces.OnStep`. Default: None.
        order: Order of the solver: 2 or 3. Default: 3.
        rtol: Error tolerance relative to |y|. Default: 0.05.
        atol: Absolute error tolerance. Default: 0.0078.
        h_init: First step in lambda. Default: 0.05.
        safety: Smallest factor at which a step is accepted. Default: 0.81.
        max_steps: Largest number of attempts. Default: 1000.

    Returns:
        The state at the last grid entry, shape (B, *S).

    Raises:
        ValueError: If the order is not 2 or 3, or the grid starts at pure noise.
        TooFewAttempts: If `max_steps` attempts do not suffice.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order}")
    alpha, sigma = alphas_sigmas(grid)
    if alpha[0] == 0:
        raise ValueError("dpm_adaptive needs a finite lambda to start from; this grid starts at alpha 0")
    last = -2 if sigma[-1] == 0 else -1  # the last state with noise
    solver = _Solver(denoise=denoise, grid=grid, order=order, rtol=rtol, atol=atol, safety=safety)
    x, attempts, stop = solver.run(x, last, h_init, max_steps, on_step)
    if last == -2 and not stop:
        d = denoise(x, grid.t[-1])
        x = step_const_x0(x, d.x0, sigma[-2], sigma[-2] / alpha[-2], alpha[-1], 0.0)
        x, _ = call_on_step(on_step, attempts, x, d)
    return x


def _alpha(lam: Tensor, like: Tensor) -> Tensor:
    """Return alpha at lambda (B,) as (B, 1, …, 1) beside `like`."""
    return broadcast(alpha_sigma_of_level(-lam)[0], like)


@dataclass(frozen=True, kw_only=True)
class _Solver:
    """An embedded pair of methods and its error tolerance; see `dpm_adaptive` for the fields."""

    denoise: DenoiseFn
    grid: TimeGrid
    order: int
    rtol: float
    atol: float
    safety: float

    def run(
        self, x: Tensor, last: int, h_init: float, max_steps: int, on_step: OnStep | None
    ) -> tuple[Tensor, int, bool]:
        """Return the state `last`, the number of attempts, and whether on_step ended the run."""
        lam, end = (
            torch.full((len(x),), float(self.grid.lam[i]), dtype=torch.float64, device="cpu")
            for i in (0, last)
        )
        h = torch.full_like(lam, h_init)  # (B,)
        y = y_before = x / float(self.grid.alpha[0])  # y_before: the lower order's at the last accepted step
        attempts, stop = 0, False
        while bool((lam < end).any()) and not stop:
            if attempts == max_steps:
                raise TooFewAttempts(
                    f"dpm_adaptive made {max_steps} attempts and is at lambda {shown(lam.tolist())}: increase"
                    " rtol or atol"
                )
            # samples that have arrived are computed with the others and not changed
            start = torch.minimum(lam, end - 1e-3)
            target = torch.minimum(start + h, end)
            low, high, d = self.attempt(y, start, target)
            error = self.error(low, high, y_before)
            factor = 1 + torch.atan((1 / (error + 1e-8)) ** (1 / self.order) - 1)
            accepted = (factor >= self.safety) & (lam < end)
            y_before = torch.where(broadcast(accepted, y).bool(), low, y_before)
            y = torch.where(broadcast(accepted, y).bool(), high, y)
            lam = torch.where(accepted, target, lam)
            h = h * factor
            x, stop = call_on_step(on_step, attempts, _alpha(lam, y) * y, d)
            y = y if on_step is None else x / _alpha(lam, y)
            attempts += 1
        return x, attempts, stop

    def error(self, low: Tensor, high: Tensor, before: Tensor) -> Tensor:
        """Return the RMS of (low − high)/tolerance per sample, shape (B,), float64 on the CPU."""
        tolerance = torch.clamp(self.rtol * torch.maximum(low.abs(), before.abs()), min=self.atol)
        return ((low - high) / tolerance).flatten(1).square().mean(1).sqrt().to("cpu", torch.float64)

    def evaluate(self, y: Tensor, lam: Tensor) -> Denoised:
        """Return the prediction for y = x/alpha (B, *S) at lambda (B,)."""
        return self.denoise(_alpha(lam, y) * y, self.grid.time(-lam))

    def attempt(self, y: Tensor, lam: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Denoised]:
        """Return the lower and the higher order's y at `target`, and the prediction at `lam`.

        With inner points at the fractions r of the step, gain(r) = rho(lambda + r·h)·(e^(r·h) − 1) integrates
        a constant eps to that point, and gain_2(r) = rho(lambda + r·h)·((e^(r·h) − 1)/(r·h) − 1) a linear
        one.

        Args:
            y: The state over alpha, shape (B, *S).
            lam: lambda of the state, shape (B,).
            target: lambda at the end of the step, shape (B,).
        """
        h = target - lam

        def gain(r: float) -> Tensor:
            z = r * h
            return broadcast(torch.exp(-(lam + z)) * torch.expm1(z), y)

        def gain_2(r: float) -> Tensor:
            z = r * h
            return broadcast(torch.exp(-(lam + z)) * (torch.expm1(z) / z - 1), y)

        d = self.evaluate(y, lam)
        first_order = y - gain(1.0) * d.eps
        if self.order == 2:
            eps_mid = self.evaluate(y - gain(0.5) * d.eps, lam + h / 2).eps
            return first_order, first_order - gain(1.0) * (eps_mid - d.eps), d
        eps_1 = self.evaluate(y - gain(1 / 3) * d.eps, lam + h / 3).eps
        y_2 = y - gain(2 / 3) * d.eps - 2 * gain_2(2 / 3) * (eps_1 - d.eps)
        eps_2 = self.evaluate(y_2, lam + 2 * h / 3).eps
        # the embedded second order: first_order − (e^h − 1)·rho/(2·r_1)·(eps_1 − eps), r_1 = 1/3
        low = first_order - 1.5 * gain(1.0) * (eps_1 - d.eps)
        return low, first_order - 1.5 * gain_2(1.0) * (eps_2 - d.eps), d
