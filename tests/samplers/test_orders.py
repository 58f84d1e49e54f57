"""Convergence to the exact flow of a Gaussian mixture, from sigma_max to sigma_min (the step to sigma 0 left off)."""

import pytest
from analytic import flow_error, mixture, slope

from ldm.grid import TimeGrid
from ldm.samplers import SAMPLERS
from ldm.schedule import NoiseSchedule

SCHEDULES = {"scaled_linear": NoiseSchedule.scaled_linear(), "linear": NoiseSchedule.linear(), "cosine": NoiseSchedule.cosine()}
ORDERS = {"ddim": 1, "dpmpp_2m": 2}
STEPS = [80, 160, 320, 640]  # asymptotic: fewer steps are printed by benchmarks/solvers.py


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["lambda", "karras"])
@pytest.mark.parametrize("name", ORDERS)
def test_order(name: str, spacing: str, schedule: str) -> None:
    data, table = mixture(), SCHEDULES[schedule]
    errors = []
    for n in STEPS:
        grid = TimeGrid.make(table, n, spacing=spacing, final="none")
        errors.append(flow_error(data, table, grid, lambda fn, x: SAMPLERS[name](fn, x, grid)))  # noqa: B023
    assert slope(STEPS, errors) == pytest.approx(ORDERS[name], abs=0.15), errors
