"""Stochastic samplers give the right distribution, and images that depend on their seed only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.analysis.oracle import gaussian, mixture, planar
from ldm.analysis.solver_errors import STOCHASTIC, SolverOptions, slope, solver_bias
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.diffusion.noise import brownian_noise, initial_noise, keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import SAMPLERS

SCHEDULE = NoiseSchedule.scaled_linear()
DATA = planar()


@pytest.mark.parametrize(("name", "options", "order", "steps"), STOCHASTIC)
def test_discretisation(name: str, options: SolverOptions, order: int | None, steps: int) -> None:
    """The discretisation error on one Gaussian, where a solver is affine, is known without sampling.

    It decreases with the weak order, and at the number of steps of test_distribution it is below one standard
    error of 20,000 samples, for the width of every component.
    """

    def bias(n: int, std: float) -> tuple[float, float, float]:
        return solver_bias(
            name, options, std, SCHEDULE, TimeGrid.make(SCHEDULE, n, spacing="karras", final="none")
        )

    for std in DATA.stds.tolist():
        mean, std_bias, truth = bias(steps, std)
        assert abs(mean) < truth / math.sqrt(20_000), mean
        assert abs(std_bias) < truth / math.sqrt(2 * 20_000), std_bias
    if order is not None:
        errors = [abs(bias(n, 0.4)[1]) for n in (160, 320)]
        # these numbers of steps are not yet asymptotic for churn, which is added in N portions
        assert slope((160, 320), errors) == pytest.approx(order, abs=0.3 if "s_churn" in options else 0.15), (
            errors
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "order", "steps"), STOCHASTIC)
def test_distribution(name: str, options: SolverOptions, order: int | None, steps: int) -> None:
    """20,000 samples, from the exact state at T to sigma_min, are within 3 standard errors.

    test_discretisation bounds the error that is not chance.
    """
    grid = TimeGrid.make(SCHEDULE, steps, spacing="karras", final="none")
    n, g = 20_000, torch.Generator().manual_seed(11)
    start = torch.randn(n, 2, generator=g, dtype=torch.float64)
    x = grid.add_noise(DATA.sample(n, seed=3), start)
    out = SAMPLERS[name](
        DATA.denoise(SCHEDULE),
        x,
        grid,
        noise=lambda k, like: torch.randn(like.shape, generator=g, dtype=like.dtype),
        **options,
    )
    scores = DATA.z_scores(out, *grid.alpha_sigma(-1))
    assert max(abs(score) for score in scores.values()) < 3, scores


def test_lcm_with_the_exact_consistency_function() -> None:
    """With f(x_t) the end of the flow, any number of steps gives the data's distribution.

    Denoising completely and adding new noise keeps the marginals.
    """
    data = mixture()

    def consistent(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (float(v) for v in SCHEDULE.alpha_sigma(t))
        return Denoised(data.flow(x, (alpha, sigma), (1.0, 0.0)), x)

    n, g = 5000, torch.Generator().manual_seed(2)
    grid = TimeGrid.make(SCHEDULE, 3, spacing="trailing")
    x = grid.add_noise(data.sample(n), torch.randn(n, 1, generator=g, dtype=torch.float64))
    out = SAMPLERS["lcm"](
        consistent, x, grid, noise=lambda k, like: torch.randn(like.shape, generator=g, dtype=like.dtype)
    )
    truth = data.sample(200_000, seed=9)
    for power in (1, 2, 3):
        spread = float((truth**power).std()) / math.sqrt(n)
        assert abs(float((out**power).mean() - (truth**power).mean())) < 3 * spread


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    """Alone, in a batch of 7, and in reverse order."""
    data, grid, seeds = gaussian(dims=3), TimeGrid.make(SCHEDULE, 8, spacing="trailing"), list(range(40, 47))

    def run(of: list[int], x: Tensor, grid: TimeGrid, **more: Any) -> Tensor:
        return SAMPLERS[name](data.denoise(SCHEDULE), x, grid, noise=keyed_noise(of), **more)

    start = initial_noise(seeds, (3,), dtype=torch.float64)
    batch = run(seeds, start, grid)
    torch.testing.assert_close(run(seeds[::-1], start.flip(0), grid).flip(0), batch, rtol=0, atol=1e-6)
    for i in range(7):
        torch.testing.assert_close(
            run([seeds[i]], start[i : i + 1], grid), batch[i : i + 1], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "euler", "euler_a", "heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "lcm", "tcd"]
)
def test_one_step_methods_resume_midway(name: str) -> None:
    """Methods without history continue from a stored state, on the rest of the grid with its noise."""
    data, grid = gaussian(dims=3), TimeGrid.make(SCHEDULE, 8, spacing="trailing")
    options = {"eta": 1.0} if name == "ddim" else {}
    kept: dict[int, Tensor] = {}
    noise, start = keyed_noise([1, 2]), initial_noise([1, 2], (3,), dtype=torch.float64)
    whole = SAMPLERS[name](
        data.denoise(SCHEDULE),
        start,
        grid,
        noise=noise,
        on_step=lambda i, x, d: kept.update({i: x}),
        **options,
    )
    rest = SAMPLERS[name](
        data.denoise(SCHEDULE), kept[3], grid.last(4), noise=lambda k, like: noise(k + 4, like), **options
    )
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-12)


def test_strength_one_is_the_whole_grid() -> None:
    data, grid = gaussian(dims=3), TimeGrid.make(SCHEDULE, 8)
    x = initial_noise([0], (3,), dtype=torch.float64)
    for name in SAMPLERS:
        a, b = (
            SAMPLERS[name](data.denoise(SCHEDULE), x, g, noise=keyed_noise([0]))
            for g in (grid, grid.tail(1.0))
        )
        assert torch.equal(a, b)


PATHS: list[tuple[str, dict[str, Any]]] = [
    ("dpmpp_2m_sde", {}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_sde", {}),
    ("euler_a", {}),
    ("ddim", {"eta": 1.0}),
    ("ddpm", {}),
    ("dpm2_a", {}),
    ("dpmpp_2s_a", {}),
]


@pytest.mark.parametrize(("name", "options"), PATHS)
def test_brownian_noise_agrees_between_step_counts(name: str, options: dict[str, Any]) -> None:
    """The same seeds give more similar results at 20 and 40 steps than with noise keyed by the step."""
    data, seeds = mixture(), list(range(24))
    start = initial_noise(seeds, (1,), dtype=torch.float64)
    inner = 0.5 if name == "dpmpp_sde" else None

    def run(steps: int, path: bool) -> Tensor:
        grid = TimeGrid.make(SCHEDULE, steps, spacing="karras")
        noise = brownian_noise(seeds, grid, inner=inner) if path else keyed_noise(seeds)
        return SAMPLERS[name](data.denoise(SCHEDULE), start, grid, noise=noise, **options)

    difference = {path: float((run(20, path) - run(40, path)).abs().mean()) for path in (True, False)}
    assert difference[True] < 0.45 * difference[False], difference
