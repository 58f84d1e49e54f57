"""Convergence to the exact flow of a Gaussian mixture, from sigma_max to sigma_min (the step to sigma 0 left off)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analytic import flow_error, mixture, slope
from torch import Tensor

from ldm.grid import TimeGrid
from ldm.samplers import SAMPLERS
from ldm.schedule import NoiseSchedule
from ldm.types import Denoised

SCHEDULES = {"scaled_linear": NoiseSchedule.scaled_linear(), "linear": NoiseSchedule.linear(), "cosine": NoiseSchedule.cosine()}
STEPS = [160, 320, 640]
# sampler, options, order. UniPC's corrector gives one order more than UniP-p. PLMS takes equal steps for granted, which leaves second order.
METHODS: list[tuple[str, dict[str, Any], int]] = [
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
    ("unipc", {"order": 2, "lower_order_final": False}, 3),
    ("unipc", {"order": 2, "lower_order_final": False, "variant": "bh1"}, 3),
    ("unipc", {"order": 3, "lower_order_final": False}, 4),
    ("unipc", {"order": 3, "lower_order_final": False, "variant": "bh1"}, 4),
]


def error(name: str, options: dict[str, Any], table: NoiseSchedule, spacing: str, n: int, start: int) -> float:
    """The error of n steps, the first ``start`` of them put on the exact flow: a multistep method's own order shows once its history is right."""
    data = mixture()
    grid = TimeGrid.make(table, n, spacing=spacing, final="none")
    state = [(float(a), float(s)) for a, s in zip(grid.alpha, grid.sigma, strict=True)]

    def run(fn: Any, x: Tensor) -> Tensor:
        def exact(i: int, x_i: Tensor, d: Denoised) -> Tensor | None:
            return data.flow(x, state[0], state[i + 1]) if i < start else None

        return SAMPLERS[name](fn, x, grid, on_step=exact, **options)

    return flow_error(data, table, grid, run)


@pytest.mark.parametrize("spacing", ["lambda", "karras"])
@pytest.mark.parametrize(("name", "options", "order"), METHODS)
def test_order(name: str, options: dict[str, Any], order: int, spacing: str) -> None:
    errors = [error(name, options, SCHEDULES["scaled_linear"], spacing, n, start=3) for n in STEPS]
    assert slope(STEPS, errors) == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("name", "options", "order"), [m for m in METHODS if m[0] in ("ddim", "dpmpp_2m", "heun", "unipc")])
def test_order_under_other_schedules(name: str, options: dict[str, Any], order: int, schedule: str) -> None:
    if schedule == "cosine" and order == 4:
        pytest.skip("errors reach 1e-10 of a range of lambda from −9 to 5 before they are asymptotic")
    errors = [error(name, options, SCHEDULES[schedule], "lambda", n, start=3) for n in STEPS]
    assert slope(STEPS, errors) == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize("name", ["dpmpp_2m", "plms", "unipc"])
def test_plain_start_keeps_second_order(name: str) -> None:
    """Without help at the start: one first-order step costs O(h²) once, which is what a second-order method loses anyway."""
    errors = [error(name, {}, SCHEDULES["scaled_linear"], "lambda", n, start=0) for n in STEPS]
    assert slope(STEPS, errors) > 1.85


def test_adaptive_follows_its_tolerance() -> None:
    data, table = mixture(), SCHEDULES["scaled_linear"]
    grid = TimeGrid.make(table, 5, spacing="karras", final="none")
    for order in (2, 3):
        errors = [
            flow_error(data, table, grid, lambda fn, x: SAMPLERS["dpm_adaptive"](fn, x, grid, order=order, rtol=tol, atol=tol))  # noqa: B023
            for tol in (1e-2, 1e-3, 1e-4)
        ]
        assert errors[0] < 0.1 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3, errors
    with pytest.raises(RuntimeError, match="made 3 attempts"):
        SAMPLERS["dpm_adaptive"](data.denoise(table), torch.zeros(1, 1, dtype=torch.float64), grid, max_steps=3)
