"""EDM's schedule: its preconditioning is that of v-prediction, and its levels are those that are given."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.catalog.cards import ScheduleCard
from ldm.diffusion.denoiser import Denoiser, denoised
from ldm.diffusion.edm import EDMSchedule
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.schedule import NoiseSchedule


@pytest.mark.parametrize(("low", "high", "data"), [(0.002, 80.0, 0.5), (0.002, 120.0, 1.0), (0.1, 3.0, 2.0)])
def test_the_preconditioning_is_that_of_the_paper(low: float, high: float, data: float) -> None:
    """Compare table 1 of Karras et al. with the denoiser of a network that returns −F."""
    schedule = EDMSchedule.between(low, high, sigma_data=data)
    generator = torch.Generator().manual_seed(0)
    y, noise, raw = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    for t in (0.0, 123.4, 999.0):
        alpha, sigma = schedule.alpha_sigma(t)
        s = float(sigma / alpha) * data
        x = data * y + s * noise
        x_t = forward = alpha * y + sigma * noise
        assert torch.allclose(x / math.sqrt(s**2 + data**2), forward)  # c_in
        skip = data**2 / (s**2 + data**2)
        out = s * data / math.sqrt(s**2 + data**2)
        wanted = (skip * x + out * raw) / data
        assert torch.allclose(denoised(-raw, x_t, alpha, sigma, "v").x0, wanted)
        assert float(schedule.network_time(torch.tensor(t, dtype=torch.float64))) == pytest.approx(
            math.log(s) / 4
        )


def test_the_levels_are_the_given_ones() -> None:
    schedule = EDMSchedule.between(0.002, 80.0, sigma_data=0.5, T=500)
    assert len(schedule) == 500
    levels = schedule.log_ratio.exp() * 0.5
    assert float(levels[0]) == pytest.approx(0.002) and float(levels[-1]) == pytest.approx(80.0)
    assert torch.allclose(schedule.log_ratio.diff(), schedule.log_ratio.diff()[:1].expand(499), rtol=1e-6)
    grid = TimeGrid.make(schedule, 5, spacing="karras")
    ramp = torch.linspace(0, 1, 5, dtype=torch.float64)
    karras = (80.0 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    assert torch.allclose(grid.ratio[:-1] * 0.5, karras) and float(grid.sigma[-1]) == 0


def test_the_network_reads_the_time_of_its_schedule() -> None:
    read = []

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
            read.append(t)
            return x

    x = torch.ones(2, 1, 2, 2)
    Denoiser(Network(), EDMSchedule.between(0.002, 80.0, sigma_data=0.5), "v")(x, 999.0)
    Denoiser(Network(), NoiseSchedule.scaled_linear(), "v")(x, 999.0)
    assert read[0].tolist() == pytest.approx([math.log(80.0) / 4] * 2) and read[1].tolist() == [999.0] * 2


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 2.0, 0.0), (1.0, math.inf, 1.0)])
def test_other_levels_are_errors(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 < sigma_min < sigma_max"):
        ScheduleCard(kind="edm", sigmas=numbers).make()


def test_sigmas_and_the_schedule_of_edm_require_each_other() -> None:
    with pytest.raises(
        ValueError, match="sigmas: schedule 'edm' and sigmas require each other, got 'linear'"
    ):
        ScheduleCard(kind="linear", sigmas=(0.1, 1.0, 1.0))
    with pytest.raises(ValueError, match="got 'edm'"):
        ScheduleCard(kind="edm")
