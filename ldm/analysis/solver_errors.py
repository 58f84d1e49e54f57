"""Measure the errors of samplers against the exact probability flow of Gaussian mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.analysis.oracle import Mixture, gaussian
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import get_sampler

SolverOptions = Mapping[str, Any]
CHURN = {"s_churn": 10.0, "s_max": 5.0, "s_min": 0.1}
# Sampler, options, order of its error. UniPC's corrector gives one order more than UniP-p. PLMS assumes equal
# steps and is of order 2 without them.
DETERMINISTIC: tuple[tuple[str, SolverOptions, int], ...] = (
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("tcd", {"eta": 0.0}, 1),
    ("dpmpp_2m", {}, 2),
    ("heun", {}, 2),
    ("restart", {"restarts": ()}, 2),
    ("dpm2", {}, 2),
    ("plms", {}, 2),
    ("dpm2_a", {"eta": 0.0}, 2),
    ("dpmpp_2s_a", {"eta": 0.0}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "solver": "heun"}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 3),
    ("dpmpp_3m_sde", {"eta": 0.0, "curvature": "published"}, 2),
    ("lms", {"order": 1}, 1),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {"order": 4}, 4),
    ("deis", {"order": 1}, 1),
    ("deis", {"order": 2}, 2),
    ("deis", {"order": 3}, 3),
    ("unipc", {"order": 1, "lower_order_final": False}, 2),
    ("unipc", {"order": 1, "lower_order_final": False, "variant": "bh1"}, 2),
    ("unipc", {"order": 2, "lower_order_final": False}, 3),
    ("unipc", {"order": 2, "lower_order_final": False, "variant": "bh1"}, 3),
    ("unipc", {"order": 3, "lower_order_final": False}, 4),
    ("unipc", {"order": 3, "lower_order_final": False, "variant": "bh1"}, 4),
)
# Sampler, options, weak order (None for a sampler with its own steps), and the number of steps that brings
# the bias below the standard error of 20,000 samples.
STOCHASTIC: tuple[tuple[str, SolverOptions, int | None, int], ...] = (
    ("ddpm", {"variance": "small"}, 1, 1000),
    ("ddpm", {"variance": "large"}, 1, 1000),
    ("ddim", {"eta": 1.0}, 1, 1000),
    ("ddim", {"eta": 0.5}, 1, 1000),
    ("euler_a", {}, 1, 1000),
    ("euler", CHURN, 1, 1000),
    ("heun", CHURN, 2, 300),
    ("dpm2", CHURN, 2, 300),
    ("dpm2_a", {}, 2, 300),
    ("dpmpp_2s_a", {}, 2, 300),
    ("dpmpp_sde", {}, 1, 1000),
    ("dpmpp_2m_sde", {}, 2, 300),
    ("dpmpp_2m_sde", {"solver": "heun"}, 2, 300),
    ("dpmpp_3m_sde", {}, 2, 300),
    ("restart", {"restarts": ((0.1, 2.0, 3, 40),)}, None, 300),
)


def flow_error(
    data: Mixture, schedule: NoiseSchedule, grid: TimeGrid, run: Callable[[DenoiseFn, Tensor], Tensor]
) -> float:
    """Return the RMS error of a solver against the exact probability flow, over 9 starting points.

    Args:
        data: The mixture, in one dimension.
        schedule: The noise schedule.
        grid: The grid, whose first and last states are those of the flow.
        run: (denoiser, first state) -> last state.
    """
    x = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64, device="cpu")[:, None]
    return float(
        (run(data.denoise(schedule), x) - data.flow(x, grid.alpha_sigma(0), grid.alpha_sigma(-1)))
        .square()
        .mean()
        .sqrt()
    )


def solver_error(
    sampler: str,
    options: SolverOptions,
    data: Mixture,
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    start: int = 0,
) -> float:
    """Return `flow_error` of a sampler.

    Args:
        sampler: Name of the sampler.
        options: Its options.
        data: The mixture, in one dimension.
        schedule: The noise schedule.
        grid: The grid.
        start: Number of first steps that are replaced by the exact flow, so that a multistep method starts
            with an exact history. Default: 0.
    """

    def run(fn: DenoiseFn, x: Tensor) -> Tensor:
        def exact(i: int, x_i: Tensor, d: Denoised) -> Tensor | None:
            return data.flow(x, grid.alpha_sigma(0), grid.alpha_sigma(i + 1)) if i < start else None

        return get_sampler(sampler)(fn, x, grid, on_step=exact, **options)

    return flow_error(data, schedule, grid, run)


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Return the order of convergence: minus the least-squares slope of log error against log steps."""
    x, y = (
        torch.tensor(steps, dtype=torch.float64, device="cpu").log(),
        torch.tensor(errors, dtype=torch.float64, device="cpu").log(),
    )
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def settled_slope(
    steps: Sequence[int], errors: Sequence[float], *, change: float = 0.05
) -> tuple[float, int]:
    """Return the order of convergence in the asymptotic range, and the number of steps where that begins.

    The range extends from the finest pair backwards, as long as the slope of a pair differs by at most
    ``change`` from that of the next finer pair. It does not depend on the expected order.

    Args:
        steps: Numbers of steps, increasing.
        errors: The error for each.
        change: Largest change of slope between pairs. Default: 0.05.
    """
    local = [slope(steps[i : i + 2], errors[i : i + 2]) for i in range(len(steps) - 1)]
    first = len(local) - 1
    while first > 0 and abs(local[first - 1] - local[first]) <= change:
        first -= 1
    return slope(steps[first:], errors[first:]), steps[first]


def affine_moments(
    run: Callable[[Tensor, NoiseFn], Tensor], draws: int, mean: float, std: float
) -> tuple[float, float]:
    """Return the exact mean and standard deviation of a stochastic solver's result for an affine denoiser.

    For a single Gaussian, the result is c + a·x + sum_k b_k·z_k. The solver runs once with a batch of x = 0,
    x = 1 and every unit draw, which gives c, a and b_k.

    Args:
        run: (first state (B, 1), noise) -> last state (B, 1).
        draws: Upper bound of the number of draws of noise.
        mean: Mean of the first state.
        std: Standard deviation of the first state.

    Raises:
        ValueError: If the solver draws noise more often than ``draws``.
    """
    x = torch.zeros(draws + 2, 1, dtype=torch.float64, device="cpu")
    x[1] = 1

    def noise(k: int, like: Tensor) -> Tensor:
        if k >= draws:
            raise ValueError(f"draws: expected more than {k} for this solver, got {draws}")
        unit = torch.zeros_like(like)
        unit[k + 2] = 1
        return unit

    out = run(x, noise)[:, 0]
    c, a, b = out[0], out[1] - out[0], out[2:] - out[0]
    return float(c + a * mean), float((a**2 * std**2 + b.square().sum()).sqrt())


def solver_bias(
    sampler: str, options: SolverOptions, std: float, schedule: NoiseSchedule, grid: TimeGrid
) -> tuple[float, float, float]:
    """Return the exact bias of a stochastic sampler for data N(1, std²), by `affine_moments`.

    Args:
        sampler: Name of the sampler.
        options: Its options.
        std: Standard deviation of the data.
        schedule: The noise schedule.
        grid: The grid; the sampler starts from the exact distribution of its first state.

    Returns:
        Errors of the mean and of the standard deviation at the grid's end, and the true standard deviation
        there.
    """
    denoise, (a, s), (b, e) = gaussian(1.0, std).denoise(schedule), grid.alpha_sigma(0), grid.alpha_sigma(-1)
    restarts = sum(item[2] for item in options.get("restarts", ()))

    def run(x: Tensor, noise: NoiseFn) -> Tensor:
        return get_sampler(sampler)(denoise, x, grid, noise=noise, **options)

    mean, final_std = affine_moments(run, 2 * len(grid) + restarts, a, math.hypot(a * std, s))
    true_std = math.hypot(b * std, e)
    return mean - b, final_std - true_std, true_std
