"""PLMS: DDIM's step with Adams–Bashforth's mean of the last four eps."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn, OnStep
from ldm.samplers.common import after, along, ratio, states, time_of, toward

# newest first
WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoise: DenoiseFn,
    x: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The transfer of DDIM with eps = sum of the last four by weights for equal steps  (PNDM,
    arXiv:2202.09778, eq. 12–13).

    The first step is improved Euler's and costs two evaluations; where a step is the only one, or comes from
    pure noise, it is plain.
    """
    alpha, sigma = states(grid)
    history: list[Tensor] = []  # the newest first
    for i, t in enumerate(grid.t):
        d = denoise(x, t)
        rho, rho_next = ratio(alpha[i], sigma[i]), ratio(alpha[i + 1], sigma[i + 1])
        if alpha[i] == 0:
            x = toward(x, d.x0, sigma[i], rho, alpha[i + 1], rho_next)
        else:
            history = [d.eps, *history][:4]
            eps = sum(w * e for w, e in zip(WEIGHTS[len(history) - 1], history, strict=True))
            if len(history) == 1 and sigma[i + 1] > 0 and len(grid) > 1:
                end = along(x, d.eps, alpha[i], rho, alpha[i + 1], rho_next)
                eps = (d.eps + denoise(end, time_of(grid, i + 1)).eps) / 2
            x = along(x, eps, alpha[i], rho, alpha[i + 1], rho_next)
        x, stop = after(on_step, i, x, d)
        if stop:
            break
    return x
