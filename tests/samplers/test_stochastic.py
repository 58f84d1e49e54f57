"""Stochastic samplers give the right distribution; noise by seed, whatever the batch; Brownian paths that
step counts share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.analysis.oracle import STOCHASTIC, SolverOptions, gaussian, mixture, planar, slope, solver_bias
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.diffusion.noise import brownian, brownian_noise, initial_noise, keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import SAMPLERS

SCHEDULE = NoiseSchedule.scaled_linear()
DATA = planar()


@pytest.mark.parametrize(("name", "options", "order", "steps"), STOCHASTIC)
def test_discretisation(name: str, options: SolverOptions, order: int | None, steps: int) -> None:
    """On one Gaussian, where a solver is affine, its discretisation error is known without sampling.

    It falls with the weak order, and at the number of steps that test_distribution takes it is below one
    standard error of 20,000 samples, for every component's width.
    """

    def bias(n: int, std: float) -> tuple[float, float, float]:
        return solver_bias(
            name, options, std, SCHEDULE, TimeGrid.make(SCHEDULE, n, spacing="karras", final="none")
        )

    for std in DATA.stds.tolist():
        mean, deviation, truth = bias(steps, std)
        assert abs(mean) < truth / math.sqrt(20_000), mean
        assert abs(deviation) < truth / math.sqrt(2 * 20_000), deviation
    if order is not None:
        errors = [abs(bias(n, 0.4)[1]) for n in (160, 320)]
        # two numbers of steps that are not yet asymptotic for churn, which is added in N portions
        assert slope((160, 320), errors) == pytest.approx(order, abs=0.3 if "s_churn" in options else 0.15), (
            errors
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "order", "steps"), STOCHASTIC)
def test_distribution(name: str, options: SolverOptions, order: int | None, steps: int) -> None:
    """20,000 samples, from the exact state at T to sigma_min: within 3 standard errors; test_discretisation
    states what is not chance."""
    grid = TimeGrid.make(SCHEDULE, steps, spacing="karras", final="none")
    n, g = 20_000, torch.Generator().manual_seed(11)
    start = torch.randn(n, 2, generator=g, dtype=torch.float64)
    x = float(grid.alpha[0]) * DATA.sample(n, seed=3) + float(grid.sigma[0]) * start
    out = SAMPLERS[name](
        DATA.denoise(SCHEDULE),
        x,
        grid,
        noise=lambda k, like: torch.randn(like.shape, generator=g, dtype=like.dtype),
        **options,
    )
    scores = DATA.z_scores(out, float(grid.alpha[-1]), float(grid.sigma[-1]))
    assert max(abs(score) for score in scores.values()) < 3, scores


def test_lcm_with_the_exact_consistency_function() -> None:
    """f(x_t) = the flow's end: every number of steps gives the data, as denoising wholly and noising afresh
    keeps the marginals."""
    data = mixture()

    def consistent(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (float(v) for v in SCHEDULE.alpha_sigma(t))
        return Denoised(data.flow(x, (alpha, sigma), (1.0, 0.0)), x)

    n, g = 5000, torch.Generator().manual_seed(2)
    grid = TimeGrid.make(SCHEDULE, 3, spacing="trailing")
    x = float(grid.alpha[0]) * data.sample(n) + float(grid.sigma[0]) * torch.randn(
        n, 1, generator=g, dtype=torch.float64
    )
    out = SAMPLERS["lcm"](
        consistent, x, grid, noise=lambda k, like: torch.randn(like.shape, generator=g, dtype=like.dtype)
    )
    truth = data.sample(200_000, seed=9)
    for power in (1, 2, 3):
        spread = float((truth**power).std()) / math.sqrt(n)
        assert abs(float((out**power).mean() - (truth**power).mean())) < 3 * spread


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_is_its_seed_s_whatever_the_batch(name: str) -> None:
    """Alone, in a batch of 7, in reverse order; resumed half way: tests/test_resume.py."""
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
def test_one_step_methods_resume_half_way(name: str) -> None:
    """What has no history goes on from a kept state: the grid's tail, and the noise of the steps that are
    left."""
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


def test_strength_one_is_text_to_image() -> None:
    data, grid = gaussian(dims=3), TimeGrid.make(SCHEDULE, 8)
    x = initial_noise([0], (3,), dtype=torch.float64)
    for name in SAMPLERS:
        a, b = (
            SAMPLERS[name](data.denoise(SCHEDULE), x, g, noise=keyed_noise([0]))
            for g in (grid, grid.tail(1.0))
        )
        assert torch.equal(a, b)


def test_brownian_path() -> None:
    """W has the covariance of Brownian motion: Var(W(b) − W(a)) = b − a, disjoint increments uncorrelated;
    20,000 numbers of one seed."""
    n = 20_000
    lams = [-math.inf, -2.0, -0.5, 0.1, 2.5]
    times = [0.0, *(math.exp(2 * lam) for lam in lams[1:])]
    path = [brownian(7, lam, (n,)) for lam in lams]
    steps = torch.stack(
        [
            (b - a) / math.sqrt(v - u)
            for a, b, u, v in zip(path[:-1], path[1:], times[:-1], times[1:], strict=True)
        ]
    )
    gram = steps @ steps.T / n
    assert float((gram - torch.eye(4, dtype=torch.float64)).abs().max()) < 4 * math.sqrt(2 / n)
    assert torch.equal(brownian(7, 0.1, (n,)), path[3]) and not torch.equal(brownian(8, 0.1, (n,)), path[3])


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
    """The same seeds at 20 and at 40 steps: far nearer to each other than with noise that belongs to the
    step's number."""
    data, seeds = mixture(), list(range(24))
    start = initial_noise(seeds, (1,), dtype=torch.float64)
    inner = 0.5 if name == "dpmpp_sde" else None

    def run(steps: int, path: bool) -> Tensor:
        grid = TimeGrid.make(SCHEDULE, steps, spacing="karras")
        noise = brownian_noise(seeds, grid, inner=inner) if path else keyed_noise(seeds)
        return SAMPLERS[name](data.denoise(SCHEDULE), start, grid, noise=noise, **options)

    apart = {path: float((run(20, path) - run(40, path)).abs().mean()) for path in (True, False)}
    assert apart[True] < 0.45 * apart[False], apart


def test_brownian_noise_is_its_seed_s_whatever_the_batch() -> None:
    grid, seeds, like = (
        TimeGrid.make(SCHEDULE, 6, spacing="karras"),
        list(range(7)),
        torch.empty(7, 3, dtype=torch.float64),
    )
    batch = brownian_noise(seeds, grid)(3, like)
    assert torch.equal(brownian_noise(seeds[::-1], grid)(3, like).flip(0), batch)
    for i in seeds:
        assert torch.equal(brownian_noise([i], grid)(3, like[:1]), batch[i : i + 1])


def test_brownian_is_refused_where_no_noise_is() -> None:
    grid = TimeGrid.make(SCHEDULE, 3)
    with pytest.raises(ValueError, match="clean data"):
        brownian_noise([0], grid)(2, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="batch of 2"):
        brownian_noise([0], grid)(0, torch.zeros(2, 2))
