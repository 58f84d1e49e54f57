"""RePaint: one pass is the sampler itself, several keep the distribution, draws and steps are numbered."""

import pytest
import torch
from torch import Tensor

from ldm.analysis.oracle import gaussian
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.diffusion.noise import keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers.ode.ddim import ddim
from ldm.samplers.ode.dpmpp_2m import dpmpp_2m
from ldm.samplers.repaint import repaint
from ldm.samplers.sde.ddpm import ddpm

SCHEDULE = NoiseSchedule.scaled_linear()
GRID = TimeGrid.make(SCHEDULE, 40, spacing="trailing")


def test_one_pass_is_the_sampler_itself() -> None:
    fn, x = gaussian().denoise(SCHEDULE), torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(repaint(dpmpp_2m, times=1, jump=40)(fn, x, GRID), dpmpp_2m(fn, x, GRID))
    # DDIM has no history, so stretches change nothing
    assert torch.equal(repaint(ddim, times=1, jump=7)(fn, x, GRID), ddim(fn, x, GRID))


@pytest.mark.parametrize("solve", [ddim, ddpm])
def test_several_passes_keep_the_distribution(solve) -> None:
    data, n = gaussian(), 4000
    grid = TimeGrid.make(SCHEDULE, 60, spacing="trailing")
    x = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = solve(data.denoise(SCHEDULE), x, grid, noise=draws(1))
    again = repaint(solve, times=3, jump=10)(data.denoise(SCHEDULE), x, grid, noise=draws(2))
    for statistic in (torch.mean, torch.std):
        # 1/sqrt(4000) = 0.016, and the solver's error
        assert abs(float(statistic(again) - statistic(plain))) < 0.1 * float(plain.std())


def draws(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda k, like: torch.randn(like.shape, dtype=like.dtype, generator=generator)


def test_steps_and_draws_are_numbered() -> None:
    steps, drawn = [], []
    noise = keyed_noise([3])

    def draw(k: int, like: Tensor) -> Tensor:
        drawn.append(k)
        return noise(k, like)

    def note(i: int, x: Tensor, d: Denoised) -> None:
        steps.append(i)
        if len(steps) == 7:
            raise StopIteration

    grid = TimeGrid.make(SCHEDULE, 4, spacing="trailing")
    fn, x = gaussian().denoise(SCHEDULE), torch.zeros(1, 2, dtype=torch.float64)
    repaint(ddim, times=2, jump=2)(fn, x, grid, noise=draw, on_step=note)
    assert steps == [0, 1, 0, 1, 2, 3, 2] and drawn == [0, 1]
    steps.clear()
    repaint(ddim, times=2, jump=2)(fn, x, grid, noise=draw)
    with pytest.raises(ValueError, match="times and jump"):
        repaint(ddim, times=0)
    with pytest.raises(ValueError, match="repaint draws noise"):
        repaint(ddim, times=2, jump=2)(fn, x, grid)
