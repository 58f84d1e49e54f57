"""Orders of convergence to the exact flow of a Gaussian mixture, from sigma_max to sigma_min."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ldm.analysis.oracle import AnalyticNet, mixture
from ldm.analysis.solver_errors import (
    DETERMINISTIC,
    SolverOptions,
    flow_error,
    settled_slope,
    slope,
    solver_error,
)
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.noise import keyed_noise
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.schedule import SCHEDULE_NAMES, NoiseSchedule
from ldm.samplers import SAMPLERS

SCHEDULES = {name: NoiseSchedule.make(name) for name in SCHEDULE_NAMES}
STEPS = [20, 40, 80, 160, 320, 640]


def error(name: str, options: SolverOptions, schedule: str, spacing: str, n: int, start: int) -> float:
    grid = TimeGrid.make(SCHEDULES[schedule], n, spacing=spacing, final="none")
    return solver_error(name, options, mixture(), SCHEDULES[schedule], grid, start=start)


def check_order(name: str, options: SolverOptions, order: int, schedule: str, spacing: str) -> None:
    errors = [error(name, options, schedule, spacing, n, start=3) for n in STEPS]
    found, since = settled_slope(STEPS, errors)
    if since == STEPS[-2]:  # not settled by the last two pairs: use the whole table
        errors.append(error(name, options, schedule, spacing, len(SCHEDULES[schedule]), start=3))
        found, since = settled_slope([*STEPS, len(SCHEDULES[schedule])], errors)
    assert found == pytest.approx(order, abs=0.15), (found, since, errors)
    assert min(errors) > 1e-12  # above rounding, which would flatten the slope


@pytest.mark.parametrize("spacing", ["lambda", "karras"])
@pytest.mark.parametrize(("name", "options", "order"), DETERMINISTIC)
def test_order(name: str, options: SolverOptions, order: int, spacing: str) -> None:
    """The slope of log error against log N, N = 20 … 640, where it has settled, is the order."""
    check_order(name, options, order, "scaled_linear", spacing)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["lambda", "karras"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("name", "options", "order"), DETERMINISTIC)
def test_order_under_other_schedules(
    name: str, options: SolverOptions, order: int, schedule: str, spacing: str
) -> None:
    check_order(name, options, order, schedule, spacing)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_order_of_one_method_of_each_kind_under_other_schedules(schedule: str) -> None:
    for name, options, order in (
        ("ddim", {}, 1),
        ("heun", {}, 2),
        ("unipc", {"order": 2, "lower_order_final": False}, 3),
    ):
        check_order(name, options, order, schedule, "lambda")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_predictions_give_one_trajectory(name: str, schedule: str) -> None:
    """eps, x0 and v of the exact network lead to the same result, so the orders above hold for each of them.

    The difference is rounding: 1e-16 through divisions by the smallest alpha (5e-5 for cosine) and the
    smallest sigma (6e-3), in 40 evaluations.
    """
    table, data = SCHEDULES[schedule], mixture()
    grid = TimeGrid.make(table, 20, spacing="trailing")
    x = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)[:, None]
    exact = SAMPLERS[name](data.denoise(table), x, grid, noise=keyed_noise(range(9)))
    for prediction in PREDICTIONS:
        denoise = Denoiser(AnalyticNet(data, table, prediction), table, prediction).bind(Cond())
        found = SAMPLERS[name](denoise, x, grid, noise=keyed_noise(range(9)))
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["dpmpp_2m", "plms", "unipc"])
def test_a_first_order_start_keeps_second_order(name: str) -> None:
    """One first-order step at the start has an error of O(h²), as the whole second-order method."""
    errors = [error(name, {}, "scaled_linear", "lambda", n, start=0) for n in STEPS]
    assert slope(STEPS[-3:], errors[-3:]) > 1.85


def test_adaptive_follows_its_tolerance() -> None:
    data, table = mixture(), SCHEDULES["scaled_linear"]
    grid = TimeGrid.make(table, 5, spacing="karras", final="none")
    for order in (2, 3):
        errors = [
            flow_error(
                data,
                table,
                grid,
                partial(SAMPLERS["dpm_adaptive"], grid=grid, order=order, rtol=tol, atol=tol),
            )
            for tol in (1e-2, 1e-3, 1e-4)
        ]
        assert errors[0] < 0.1 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3, errors
    with pytest.raises(RuntimeError, match="made 3 attempts"):
        SAMPLERS["dpm_adaptive"](
            data.denoise(table), torch.zeros(1, 1, dtype=torch.float64), grid, max_steps=3
        )
