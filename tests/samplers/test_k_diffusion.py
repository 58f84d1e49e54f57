"""Trajectories equal those of k-diffusion's functions, in float64, on the same grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from k_diffusion_sampling import k_sampling
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.diffusion.schedule import NoiseSchedule, broadcast
from ldm.samplers import SAMPLERS

SCHEDULE = NoiseSchedule.scaled_linear()
NOISE = torch.randn(200, 2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
# name, k-diffusion's name, options, k-diffusion's options
PAIRS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("euler", "sample_euler", {}, {}),
    (
        "euler",
        "sample_euler",
        {"s_churn": 5.0, "s_max": 10.0, "s_noise": 1.01},
        {"s_churn": 5.0, "s_tmax": 10.0, "s_noise": 1.01},
    ),
    ("euler_a", "sample_euler_ancestral", {}, {}),
    ("euler_a", "sample_euler_ancestral", {"eta": 0.6}, {"eta": 0.6}),
    ("heun", "sample_heun", {}, {}),
    ("heun", "sample_heun", {"s_churn": 5.0, "s_max": 10.0}, {"s_churn": 5.0, "s_tmax": 10.0}),
    ("dpm2", "sample_dpm_2", {}, {}),
    ("dpm2_a", "sample_dpm_2_ancestral", {}, {}),
    ("lms", "sample_lms", {}, {}),
    ("lms", "sample_lms", {"order": 2}, {"order": 2}),
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", {}, {}),
    ("dpmpp_sde", "sample_dpmpp_sde", {}, {}),
    ("dpmpp_sde", "sample_dpmpp_sde", {"eta": 0.5, "r": 0.4}, {"eta": 0.5, "r": 0.4}),
    ("dpmpp_2m", "sample_dpmpp_2m", {}, {}),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {}, {}),
    (
        "dpmpp_2m_sde",
        "sample_dpmpp_2m_sde",
        {"eta": 0.7, "solver": "heun"},
        {"eta": 0.7, "solver_type": "heun"},
    ),
    # k-diffusion weighs the second difference by phi_3, but the integral of s² is 2·phi_3: see dpmpp_3m_sde
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"curvature": "published"}, {}),
]


def eps(x: Tensor, t: Tensor) -> Tensor:
    """Return the prediction of a stub network: smooth, nonlinear, dependent on t."""
    return 0.6 * torch.sin(1.3 * x + 0.002 * broadcast(torch.as_tensor(t), x)) + 0.4 * x


def denoise(x: Tensor, t: Tensor) -> Denoised:
    alpha, sigma = SCHEDULE.alpha_sigma_like(t, x)
    e = eps(x, t)
    return Denoised((x - sigma * e) / alpha, e)


def k_model(grid: TimeGrid) -> Callable[[Tensor, Tensor], Tensor]:
    def model(y: Tensor, rho: Tensor) -> Tensor:
        alpha = 1 / (1 + rho[0] ** 2).sqrt()
        return y - rho[0] * eps(y * alpha, grid.time(rho[:1].log()))

    return model


@pytest.mark.parametrize("steps", [1, 5, 10, 20, 50])
@pytest.mark.parametrize(
    "spacing", ["karras", "exponential", "polyexponential", "linspace", "trailing", "leading"]
)
@pytest.mark.parametrize(("name", "peer", "options", "peer_options"), PAIRS)
def test_trajectory(
    name: str,
    peer: str,
    options: dict[str, Any],
    peer_options: dict[str, Any],
    spacing: str,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = k_sampling()
    grid = TimeGrid.make(SCHEDULE, steps, spacing=spacing)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if "s_churn" in options:  # k-diffusion draws at every step, whether it uses the noise or not
        draws = iter(NOISE)
        monkeypatch.setattr(torch, "randn_like", lambda like: next(draws))
    elif name in ("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        order = iter(NOISE)
        peer_options = {**peer_options, "noise_sampler": lambda rho, rho_next: next(order)}
    alpha = float(grid.alpha[0])
    if steps == 1 and peer in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        # k-diffusion reads h, which a single step to sigma 0 never sets
        with pytest.raises(UnboundLocalError):
            getattr(sampling, peer)(k_model(grid), x / alpha, grid.ratio, disable=True, **peer_options)
        expected = denoise(x, grid.t[0]).x0
    else:
        expected = getattr(sampling, peer)(k_model(grid), x / alpha, grid.ratio, disable=True, **peer_options)
    actual = SAMPLERS[name](denoise, x, grid, noise=lambda k, like: NOISE[k], **options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive(order: int) -> None:
    """For one sample, as k-diffusion's error is that of the whole batch. It ends at sigma_min."""
    sampling = k_sampling()
    grid = TimeGrid.make(SCHEDULE, 5, spacing="karras", final="none")
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = float(grid.ratio[-1]), float(grid.ratio[0])
    y = x / float(grid.alpha[0])
    sampling.torch.set_default_dtype(torch.float64)
    try:
        expected = sampling.sample_dpm_adaptive(k_model(grid), y, low, high, order=order, disable=True)
    finally:
        sampling.torch.set_default_dtype(torch.float32)
    actual = SAMPLERS["dpm_adaptive"](denoise, x, grid, order=order) / float(grid.alpha[-1])
    # k-diffusion stops within 1e-5 of the end in lambda
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
