"""Bits per dimension against closed forms."""

import math

import pytest
import torch

from ldm.analysis.likelihood import bound_bits, flow_bits
from ldm.analysis.oracle import AnalyticNet, Mixture, gaussian, mixture
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.noise import keyed_noise
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.schedule import NoiseSchedule

# DDPM's schedule has alpha_T = 0.006, so that the data become N(0, 1); scaled_linear ends at 0.07, which
# costs 0.03 bits per sample
SCHEDULE = NoiseSchedule.linear()


def closed_form(data: Mixture, x0: torch.Tensor) -> torch.Tensor:
    return -data.logp(x0) / math.log(2) / x0.shape[1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gaussian_within_a_hundredth_of_a_bit(prediction: str) -> None:
    data = gaussian(0.5, 0.8, dims=8)
    x0 = data.sample(64)
    denoise = Denoiser(AnalyticNet(data, SCHEDULE, prediction), SCHEDULE, prediction).bind(Cond())  # type: ignore[arg-type]
    truth = closed_form(data, x0)
    grid = TimeGrid.make(SCHEDULE, 30, spacing="lambda", final="none")
    flow = flow_bits(denoise, x0, grid, noise=keyed_noise(range(64)), probes=2)
    # the remaining error: the prior's mismatch, 0.006·0.5 standard deviations, and sigma_min = 0.01 of noise
    assert float((flow.bits - truth).abs().mean()) < 0.01
    assert float((flow.bits.mean() - truth.mean()).abs()) < 0.01
    assert float(flow.error.max()) < 1e-6  # the divergence of an affine field has no variance under ±1 probes
    # the integral of the bound is a Monte-Carlo mean: the tolerance includes 3 of its standard errors
    x0, g = data.sample(4096), torch.Generator().manual_seed(0)
    bound = bound_bits(
        denoise,
        x0,
        grid,
        noise=lambda k, like: torch.randn(like.shape, generator=g, dtype=like.dtype),
        samples=400,
    )
    mean_error = float(bound.error.square().sum().sqrt() / len(x0))
    assert 3 * mean_error < 0.005, mean_error
    assert abs(float(bound.bits.mean() - closed_form(data, x0).mean())) < 0.01


def test_mixture_flow_is_exact_and_the_bound_is_above_it() -> None:
    data = mixture()
    x0 = data.sample(256)
    denoise, truth = data.denoise(SCHEDULE), closed_form(data, x0)
    grid = TimeGrid.make(SCHEDULE, 60, spacing="lambda", final="none")
    flow = flow_bits(denoise, x0, grid, noise=keyed_noise(range(256)))
    assert float((flow.bits - truth).abs().max()) < 0.02 and bool(flow.error.isnan().all())
    bound = bound_bits(denoise, x0, grid, noise=keyed_noise(range(256)), samples=200)
    assert abs(float(bound.bits.mean() - truth.mean())) < 0.01 + 3 * float(
        bound.error.square().sum().sqrt() / 256
    )
    blurred = bound_bits(
        Mixture.denoise(gaussian(0, 2.0), SCHEDULE), x0, grid, noise=keyed_noise(range(256)), samples=200
    )
    assert float(blurred.bits.mean()) > float(bound.bits.mean()) + 0.1  # a wrong model costs bits


def test_hutchinson_s_error_is_what_is_seen() -> None:
    """For a Jacobian that is not diagonal, estimates scatter around the trace by the stated error."""
    data = Mixture(
        means=torch.tensor([[1.0, 1, 0, 0], [-1, 0, 1, 1]], dtype=torch.float64),
        stds=torch.tensor([0.5, 0.6], dtype=torch.float64),
        weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
    )
    x0 = data.sample(1).expand(200, 4).clone()
    grid = TimeGrid.make(SCHEDULE, 20, spacing="lambda", final="none")
    flow = flow_bits(data.denoise(SCHEDULE), x0, grid, noise=keyed_noise(range(200)), probes=8)
    seen, stated = float(flow.bits.std()), float(flow.error.square().mean().sqrt())
    assert (
        0.8 < seen / stated < 1.25
    )  # 200 samples give a standard deviation to 5 %, and so does the RMS of 8 probes
    truth = float(closed_form(data, x0)[0])
    assert abs(float(flow.bits.mean()) - truth) < 0.01 + 3 * seen / math.sqrt(200)


def test_bins_and_wrong_input() -> None:
    data = gaussian(dims=4)
    x0 = data.sample(3)
    grid = TimeGrid.make(SCHEDULE, 10, spacing="lambda", final="none")
    plain, binned = (
        flow_bits(data.denoise(SCHEDULE), x0, grid, noise=keyed_noise(range(3)), bin_width=w).bits
        for w in (None, 2 / 255)
    )
    torch.testing.assert_close(binned - plain, torch.full((3,), math.log2(127.5), dtype=torch.float64))
    with pytest.raises(ValueError, match="probes"):
        flow_bits(data.denoise(SCHEDULE), x0, grid, noise=keyed_noise(range(3)), probes=0)
    with pytest.raises(ValueError, match="finite"):
        zero = TimeGrid.make(SCHEDULE.zero_terminal_snr(), 10, spacing="trailing")
        flow_bits(data.denoise(SCHEDULE), x0, zero, noise=keyed_noise(range(3)))
