"""PLMS: DDIM with Adams–Bashforth's mean of the last four eps (PNDM, Liu et al. 2022, arXiv:2202.09778).

With y = x/alpha and rho = sigma/alpha, one step is (eq. 12 and 13, with the weights for equal steps)

    y' = y + (rho' − rho)·(55·eps_0 − 59·eps_1 + 37·eps_2 − 9·eps_3)/24

eps_j is the estimate j steps ago. With a shorter history the formula of that length is used; the first step
is improved Euler's and costs a second evaluation. A step from pure noise, and the only step of a grid, is
DDIM's.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import alphas_sigmas, call_on_step, noise_ratio, step_const_eps, step_const_x0

# Adams–Bashforth for 1 to 4 evaluations, newest first
WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with PLMS (Liu et al. 2022, eq. 12–13), one evaluation per step and one more in the first.

    Args:
        denoise: The denoiser, `(x_t, t) -> Denoised`.
        x: The state at grid entry 0, shape (B, *S).
        grid: The time grid of N steps.
        noise: Not used. Default: None.
        on_step: Called after each step; see `ldm.diffusion.interfaces.OnStep`. Default: None.

    Returns:
        The state at the last grid entry, shape (B, *S).
    """
    alpha, sigma = alphas_sigmas(grid)
    history: list[Tensor] = []  # eps, newest first
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = noise_ratio(alpha[i], sigma[i]), noise_ratio(alpha[i + 1], sigma[i + 1])
        if alpha[i] == 0:
            x = step_const_x0(x, d.x0, sigma[i], rho, alpha[i + 1], rho_next)
        else:
            history = [d.eps, *history][:4]
            if len(history) == 1 and sigma[i + 1] > 0 and len(grid) > 1:
                end = step_const_eps(x, d.eps, alpha[i], rho, alpha[i + 1], rho_next)
                eps = (d.eps + denoise(end, grid.time_of_state(i + 1)).eps) / 2
            else:
                eps = _weighted_sum(WEIGHTS[len(history) - 1], history)
            x = step_const_eps(x, eps, alpha[i], rho, alpha[i + 1], rho_next)
        x, stop = call_on_step(on_step, i, x, d)
        if stop:
            break
    return x


def _weighted_sum(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    """Return the sum of values (B, *S) by weights."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total
