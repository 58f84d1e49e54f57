"""What all samplers share, and the steps of ddpm and ddim in closed form."""

import math

import pytest
import torch
from torch import Tensor

from ldm.analysis.oracle import gaussian
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.diffusion.noise import keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import SAMPLERS, get_sampler
from ldm.samplers.ode.ddim import ddim
from ldm.samplers.sde.ddpm import ddpm

SCHEDULE = NoiseSchedule.scaled_linear()


def fixed(x0: Tensor) -> object:
    """Return a denoiser whose x0 is given."""

    def fn(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        return Denoised(x0.expand_as(x), (x - alpha * x0) / sigma)

    return fn


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_one_step_draws_from_the_posterior(sampler: str) -> None:
    """One step has the mean and variance of q(x_s | x_t, x0), by Bayes from q(x_t | x_s) and q(x_s | x0)."""
    grid = TimeGrid.explicit(SCHEDULE, [700.0, 300.0], final="none")
    (a_t, a_s), (_, s_s) = grid.alpha.tolist(), grid.sigma.tolist()
    step, beta = a_t / a_s, 1 - (a_t / a_s) ** 2
    x0, x = 0.6, -0.4
    # x_s has the prior N(a_s·x0, s_s²) and the likelihood x_t ~ N(step·x_s, beta)
    precision = 1 / s_s**2 + step**2 / beta
    mean = (a_s * x0 / s_s**2 + step * x / beta) / precision
    options = {"eta": 1.0} if sampler == "ddim" else {"variance": "small"}
    one = torch.ones(1, 1, dtype=torch.float64)

    def run(z):
        return float(
            SAMPLERS[sampler](fixed(x0 * one), x * one, grid, noise=lambda k, like: z * one, **options)
        )

    assert run(0.0) == pytest.approx(mean, rel=1e-12)
    assert (run(1.0) - run(0.0)) ** 2 == pytest.approx(1 / precision, rel=1e-12)


def test_ddpm_variances() -> None:
    grid = TimeGrid.explicit(SCHEDULE, [700.0, 300.0], final="none")
    beta = float(1 - (grid.alpha[0] / grid.alpha[1]) ** 2)
    small = beta * float(grid.sigma[1] / grid.sigma[0]) ** 2
    x = torch.zeros(1, 2, dtype=torch.float64)
    fraction = torch.tensor([[0.0, 0.25]], dtype=torch.float64)

    def fn(x: Tensor, t: Tensor) -> Denoised:
        return Denoised(x * 0, x, fraction)

    def variance(kind: str) -> list[float]:
        out = ddpm(fn, x, grid, noise=lambda k, like: torch.ones_like(like), variance=kind)  # type: ignore[arg-type]
        return (out**2)[0].tolist()

    assert variance("small") == pytest.approx([small] * 2)
    assert variance("large") == pytest.approx([beta] * 2)
    assert variance("learned") == pytest.approx([small, beta**0.25 * small**0.75])
    with pytest.raises(ValueError, match="learned_var=True"):
        ddpm(fixed(x), x, grid, noise=keyed_noise([0]), variance="learned")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown variance 'tiny'"):
        ddpm(fn, x, grid, noise=keyed_noise([0]), variance="tiny")  # type: ignore[arg-type]


def test_step_to_clean_data_adds_no_noise() -> None:
    grid = TimeGrid.make(SCHEDULE, 1, spacing="trailing")
    x0 = torch.full((1, 3), 0.3, dtype=torch.float64)
    for name in SAMPLERS:
        noise = keyed_noise([0])
        out = SAMPLERS[name](fixed(x0), torch.randn(1, 3, dtype=torch.float64), grid, noise=noise)
        # lcm: c_skip = 0.25/(9990² + 0.25) = 3e-9
        torch.testing.assert_close(out, x0, rtol=0, atol=1e-8 if name == "lcm" else 1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_gets_replaces_and_stops(name: str) -> None:
    grid, data = TimeGrid.make(SCHEDULE, 6, spacing="trailing"), gaussian()
    x = torch.ones(2, 1, dtype=torch.float64)

    def run(hook):
        return SAMPLERS[name](data.denoise(SCHEDULE), x, grid, noise=keyed_noise([0, 1]), on_step=hook)

    seen: list[tuple[int, Tensor]] = []
    out = run(lambda i, x, d: seen.append((i, x)))
    assert [i for i, _ in seen] == list(range(len(seen))) and torch.equal(seen[-1][1], out)
    assert len(seen) == 6 or name == "dpm_adaptive"

    def stop(i: int, x: Tensor, d: Denoised) -> None:
        if i == 2:
            raise StopIteration

    torch.testing.assert_close(run(stop), seen[2][1], rtol=0, atol=0)
    assert float(run(lambda i, x, d: torch.full_like(x, 7.0)).mean()) == 7.0


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    zero = SCHEDULE.zero_terminal_snr()
    data = gaussian()
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    exact = data.flow(x, (0.0, 1.0), (1.0, 0.0))
    for name in ("ddim", "dpmpp_2m"):
        grids = [TimeGrid.make(zero, n, spacing="trailing") for n in (50, 200)]
        few, many = (
            float((SAMPLERS[name](data.denoise(zero), x, grid) - exact).abs().max()) for grid in grids
        )
        # the step from lambda = −inf is of order 1: four times the steps give a quarter of the error
        assert few < 0.1 and many < 0.35 * few


def test_wrong_input() -> None:
    x, grid = torch.zeros(1, 1), TimeGrid.make(SCHEDULE, 2)
    with pytest.raises(ValueError, match="give noise"):
        ddpm(fixed(x), x, grid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give noise"):
        ddim(fixed(x), x, grid, eta=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eta"):
        ddim(fixed(x), x, grid, eta=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        get_sampler("dpmpp2m")
    assert math.isfinite(float(ddim(fixed(x), x, grid)))  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", ["karras", "linspace"])
def test_lcm_leaves_no_noise_on_a_grid_that_ends_at_the_first_entry(spacing: str) -> None:
    """The state at t = 0 has noise of the first entry, which the consistency function's c_skip would keep."""
    grid = TimeGrid.make(SCHEDULE, 4, spacing=spacing)
    assert float(grid.t[-1]) == 0 and float(grid.sigma[-1]) == 0
    data = torch.linspace(-1, 1, 8)[None]

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = SCHEDULE.alpha_sigma(torch.as_tensor(t))
        return Denoised(data.expand_as(x), (x - alpha * data) / sigma)

    made = SAMPLERS["lcm"](denoise, torch.randn(2, 8), grid, noise=keyed_noise([0, 1]))
    assert torch.allclose(made, data.expand(2, 8), atol=1e-6)
