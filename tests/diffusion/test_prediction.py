"""Conversions between eps, x0 and v."""

import pytest
import torch

from ldm.diffusion.denoiser import denoised
from ldm.diffusion.prediction import PREDICTIONS, target
from ldm.diffusion.schedule import NoiseSchedule


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_round_trip(prediction: str) -> None:
    """`denoised` of the target at x_t gives the x0 and eps that x_t was mixed from."""
    schedule = NoiseSchedule.scaled_linear()
    g = torch.Generator().manual_seed(0)
    x0, eps = (
        torch.randn(5, 3, 2, generator=g, dtype=torch.float64),
        torch.randn(5, 3, 2, generator=g, dtype=torch.float64),
    )
    t = torch.tensor([0.0, 10.5, 400, 998.25, 999], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma_like(t, x0)
    x_t = schedule.add_noise(x0, t, eps)
    d = denoised(target(x0, eps, alpha, sigma, prediction), x_t, alpha, sigma, prediction)
    # dividing by alpha ~ 0.07 or sigma ~ 0.03 costs two digits of 16
    torch.testing.assert_close(d.x0, x0, rtol=0, atol=1e-13)
    torch.testing.assert_close(d.eps, eps, rtol=0, atol=1e-13)


def test_v_is_the_velocity_on_the_circle() -> None:
    """With alpha = cos φ, sigma = sin φ: v = dx/dφ, by a central difference."""
    x0, eps = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.1, dtype=torch.float64)
    phi, h = torch.tensor(0.4, dtype=torch.float64), 1e-5
    at = lambda p: p.cos() * x0 + p.sin() * eps  # noqa: E731
    torch.testing.assert_close(
        target(x0, eps, phi.cos(), phi.sin(), "v"), (at(phi + h) - at(phi - h)) / (2 * h), rtol=0, atol=1e-9
    )


def test_unknown_name() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        target(one, one, one, one, "epss")  # type: ignore[arg-type]
