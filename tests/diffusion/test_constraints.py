"""Constraints on x0: eps stays consistent, and each wrapper follows its formula."""

import pytest
import torch
from torch import Tensor

from ldm.analysis.oracle import AnalyticNet, gaussian
from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import clip_x0, dynamic_threshold, keep_known
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import SAMPLERS

SCHEDULE = NoiseSchedule.scaled_linear()
T = torch.tensor(400.0)


def perfect(dims: int = 6) -> DenoiseFn:
    """Return the denoiser of a perfectly trained network on a Gaussian, under a condition."""
    denoiser = Denoiser(AnalyticNet(gaussian(dims=dims), SCHEDULE, "eps"), SCHEDULE, "eps")
    return denoiser.bind(Cond(pooled=torch.full((1, dims), 1.5)))


def state(n: int = 3, dims: int = 6) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_clip_derives_eps_again() -> None:
    x = 3 * state()
    d = clip_x0(perfect(), SCHEDULE, 0.5)(x, T)
    assert float(d.x0.abs().max()) == 0.5
    alpha, sigma = SCHEDULE.alpha_sigma(T)
    torch.testing.assert_close(alpha * d.x0 + sigma * d.eps, x, rtol=0, atol=1e-12)


def test_dynamic_threshold_formula() -> None:
    x0 = 4 * state(4, 101)
    x0[0] *= 0.01  # within [−1, 1]

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(x0, x_t)

    d = dynamic_threshold(fn, SCHEDULE, 0.9)(x0, T)
    s = torch.quantile(x0.abs(), 0.9, dim=1).clamp(min=1)[:, None]
    assert float(s[0]) == 1 and float(s[1]) > 1
    torch.testing.assert_close(d.x0, x0.clamp(-s, s) / s)
    capped = dynamic_threshold(fn, SCHEDULE, 0.9, most=1.0)(x0, T)
    torch.testing.assert_close(capped.x0, x0.clamp(-1, 1))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_keep_known_carries_the_known_region(sampler: str) -> None:
    """After every step the known half is alpha'·known + sigma'·(its own noise), at the end exactly known."""
    x, known = state(), state() * 0 + 0.7
    mask = torch.tensor([0.0, 0, 0, 1, 1, 1])
    grid = TimeGrid.make(SCHEDULE, 10, offset=1)
    x = torch.where(mask == 1, x, grid.add_noise(known, x))
    noise = (x - float(grid.alpha[0]) * known) / float(grid.sigma[0])
    seen = []
    fn = keep_known(perfect(), SCHEDULE, known, mask)
    out = SAMPLERS[sampler](fn, x, grid, on_step=lambda i, x, d: seen.append(x))
    for i, x_i in enumerate(seen):
        expected = grid.add_noise(known, noise, i + 1)
        torch.testing.assert_close(x_i[:, :3], expected[:, :3], rtol=0, atol=1e-10)
    torch.testing.assert_close(out[:, :3], known[:, :3], rtol=0, atol=1e-12)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="quantile"):
        dynamic_threshold(perfect(), SCHEDULE, 0)
    with pytest.raises(ValueError, match="limit"):
        clip_x0(perfect(), SCHEDULE, 0)
