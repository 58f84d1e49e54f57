"""Solvers on an oracle: errors on a Gaussian mixture's exact flow, and biases of the stochastic ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ldm.analysis.oracle import mixture, planar
from ldm.analysis.solver_errors import (
    DETERMINISTIC,
    STOCHASTIC,
    SolverOptions,
    settled_slope,
    slope,
    solver_bias,
    solver_error,
)
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.schedule import NoiseSchedule, ScheduleName
from ldm.samplers import get_sampler

STEPS = (20, 40, 80, 160, 320, 640)


def label(sampler: str, options: SolverOptions) -> str:
    """Return the sampler with its options, abbreviated."""
    return sampler + "".join(
        f", {key} {value}"
        for key, value in options.items()
        if key not in ("lower_order_final", "s_max", "s_min")
    )


def deterministic_rows(
    schedule: ScheduleName, steps: Sequence[int], samplers: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return the errors of every deterministic method by grid and number of steps, and asymptotic slopes.

    On `lambda` and `karras`, from sigma_max to sigma_min, the first three steps are exact. The other grids
    are as a user has them, from the method's own start: `leading` and `trailing` without the last step,
    `karras to 0` with it. The error is None for a number of steps that a grid refuses.
    """
    table, data, rows = NoiseSchedule.make(schedule), mixture(), []
    for sampler, options, order in DETERMINISTIC:
        if samplers is not None and sampler not in samplers:
            continue
        row: dict[str, Any] = {
            "sampler": sampler,
            "options": dict(options),
            "order": order,
            "schedule": schedule,
            "errors": {},
            "slopes": {},
        }
        for name, spacing, final, start in (
            ("lambda", "lambda", "none", 3),
            ("karras", "karras", "none", 3),
            ("leading", "leading", "none", 0),
            ("trailing", "trailing", "none", 0),
            ("karras to 0", "karras", "data", 0),
        ):
            errors = [one_error(sampler, options, table, spacing, final, n, start, data) for n in steps]
            row["errors"][name] = errors
            if start and len(steps) > 1:
                row["slopes"][name] = settled_slope(steps, [e for e in errors if e is not None])
        rows.append(row)
    return rows


def one_error(
    sampler: str,
    options: SolverOptions,
    table: NoiseSchedule,
    spacing: str,
    final: Any,
    n: int,
    start: int,
    data: Any,
) -> float | None:
    """Return the error of n steps; None if the grid refuses n."""
    try:
        grid = TimeGrid.make(table, n, spacing=spacing, final=final)
    except ValueError:
        return None
    return solver_error(sampler, options, data, table, grid, start=start)


def stochastic_rows(samples: int, samplers: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the bias of every stochastic method, in standard errors of `samples`, and how it falls.

    The bias is exact for one Gaussian. `scores` are the errors, in standard errors, of mean, covariance and
    weights of `samples` samples of a mixture in the plane.
    """
    table, rows = NoiseSchedule.scaled_linear(), []
    for sampler, options, order, steps in STOCHASTIC:
        if samplers is not None and sampler not in samplers:
            continue
        grids = {n: TimeGrid.make(table, n, spacing="karras", final="none") for n in {steps, 160, 320}}
        biases = [solver_bias(sampler, options, std, table, grids[steps]) for std in planar().stds.tolist()]
        pair = [abs(solver_bias(sampler, options, 0.4, table, grids[n])[1]) for n in (160, 320)]
        row = {
            "sampler": sampler,
            "options": dict(options),
            "steps": steps,
            "bias_mean": max(abs(mean) / truth for mean, _, truth in biases) * math.sqrt(samples),
            "bias_deviation": (
                max(abs(deviation) / truth for _, deviation, truth in biases) * math.sqrt(2 * samples)
            ),
            "weak_order": order,
            "weak_slope": slope((160, 320), pair) if order is not None else None,
        }
        scores = sampled_scores(sampler, options, table, grids[steps], samples)
        rows.append(
            {
                **row,
                "samples": samples,
                "scores": scores,
                "largest_score": max(abs(score) for score in scores.values()),
            }
        )
    return rows


def sampled_scores(
    sampler: str, options: SolverOptions, table: NoiseSchedule, grid: TimeGrid, samples: int
) -> dict[str, float]:
    """Return the errors of samples from the exact first state at the grid's end, in standard errors."""
    data, g = planar(), torch.Generator().manual_seed(11)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=g, dtype=like.dtype)

    x = data.sample(samples, seed=3)
    x = grid.add_noise(x, normal(x))
    out = get_sampler(sampler)(data.denoise(table), x, grid, noise=lambda k, like: normal(like), **options)
    return data.z_scores(out, *grid.alpha_sigma(-1))


def deterministic_table(rows: Sequence[dict[str, Any]], steps: Sequence[int]) -> str:
    """Return a Markdown table of slopes, with the steps from which they are stable, and of errors.

    Errors are those at the fewest and the most steps that every grid has.
    """
    few, many = steps[0], max((n for n in steps if n <= 320), default=steps[-1])
    grids = ("karras", "leading", "trailing", "karras to 0")
    head = [
        "sampler",
        "order",
        "slope, uniform λ",
        "slope, karras",
        *(f"{grid}, {n}" for grid in grids for n in dict.fromkeys((few, many))),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        slopes = [row["slopes"].get(grid) for grid in ("lambda", "karras")]
        cells = [label(row["sampler"], row["options"]), str(row["order"])]
        cells += ["" if found is None else f"{found[0]:.2f} (from {found[1]})" for found in slopes]
        for grid in grids:
            cells += [
                error_text(row["errors"][grid][list(steps).index(n)]) for n in dict.fromkeys((few, many))
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def error_text(error: float | None) -> str:
    """Return an error in two digits; a dash if the grid refuses the number of steps."""
    return "–" if error is None else f"{error:.1e}"


def stochastic_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of biases, weak slopes, and the largest error of the samples."""
    head = [
        "sampler",
        "steps",
        "bias of the mean",
        "bias of the standard deviation",
        "weak order",
        "slope, 160 to 320",
        "largest error of the samples",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        weak = (
            ["own steps", ""]
            if row["weak_order"] is None
            else [str(row["weak_order"]), f"{row['weak_slope']:.2f}"]
        )
        cells = [
            label(row["sampler"], row["options"]),
            str(row["steps"]),
            f"{row['bias_mean']:.2f}",
            f"{row['bias_deviation']:.2f}",
            *weak,
        ]
        lines.append("| " + " | ".join([*cells, f"{row['largest_score']:.2f}"]) + " |")
    return "\n".join(lines)
