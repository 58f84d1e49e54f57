"""Estimate likelihoods in bits per dimension, by the probability flow and by the variational bound."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, NoiseFn
from ldm.diffusion.schedule import alpha_sigma_of_level, broadcast, forward_noise


class Bits(NamedTuple):
    """Bits per dimension of each sample, and the standard error of the estimate; each (B,) float64."""

    bits: Tensor
    error: Tensor


def flow_bits(
    denoise: DenoiseFn,
    x0: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn,
    probes: int = 1,
    bin_width: float | None = None,
) -> Bits:
    """Return bits per dimension by the probability-flow ODE (Song et al., arXiv:2011.13456, eq. 39–40).

    With y = x/alpha and rho = sigma/alpha: dy/drho = eps and dlog p/drho = −div eps. The ODE is solved from
    rho of the grid's last state with noise to that of its first, by the classical Runge–Kutta method in log
    rho over the grid's steps, with 4 evaluations and 4·probes gradients per step. At the first state x is
    taken to be standard normal. The divergence is Hutchinson's estimate.

    Args:
        denoise: The denoiser, differentiable in x.
        x0: The data, shape (B, *S).
        grid: The grid. Its first state must have finite sigma/alpha.
        noise: The noise; the signs of its draws 0, 1, … are the probes.
        probes: Number of vectors of ±1 that estimate the divergence. Default: 1.
        bin_width: Width of the bins of dequantised data (2/255 for 8-bit pixels in [−1, 1]), for the bits of
            the bin; None for the density.

    Returns:
        The bits, and their standard error over the probes (NaN for one probe).

    Raises:
        ValueError: If ``probes`` is less than 1, or the grid has fewer than two states with finite
            sigma/alpha above 0.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    levels = grid.ratio[grid.sigma > 0].flip(0).log().tolist()  # log rho, rising
    if len(levels) < 2 or math.isinf(levels[-1]):
        raise ValueError("the grid must have at least two states with finite sigma/alpha above 0")
    signs = [torch.where(noise(k, x0) < 0, -1.0, 1.0).to(x0.dtype) for k in range(probes)]
    y, trace = x0, torch.zeros(probes, len(x0), dtype=torch.float64, device="cpu")
    for u, u_next in zip(levels[:-1], levels[1:], strict=True):
        h = u_next - u
        k1, d1 = _flow_slope(denoise, y, u, grid, signs)
        k2, d2 = _flow_slope(denoise, y + h / 2 * k1, u + h / 2, grid, signs)
        k3, d3 = _flow_slope(denoise, y + h / 2 * k2, u + h / 2, grid, signs)
        k4, d4 = _flow_slope(denoise, y + h * k3, u_next, grid, signs)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        trace = trace + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    variance = 1 + math.exp(2 * levels[-1])  # of y where x = alpha·y is standard normal
    dims = x0[0].numel()
    prior = -0.5 * _squared_norm(y) / variance - 0.5 * dims * math.log(2 * math.pi * variance)
    scale = dims * math.log(2)
    bits = -(prior + trace.mean(0)) / scale - (0 if bin_width is None else math.log2(bin_width))
    return Bits(
        bits, trace.std(0) / math.sqrt(probes) / scale if probes > 1 else torch.full_like(bits, math.nan)
    )


def _flow_slope(
    denoise: DenoiseFn, y: Tensor, level: float, grid: TimeGrid, signs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the slope of the probability flow and estimates of its divergence.

    Args:
        denoise: The denoiser.
        y: State x/alpha, shape (B, *S).
        level: Log rho of the state.
        grid: The grid, which gives t at a level.
        signs: Probes of ±1, shape (B, *S) each.

    Returns:
        dy/dlog rho, shape (B, *S), and the estimates, shape (probes, B).
    """
    rho = math.exp(level)
    with torch.inference_mode(False), torch.enable_grad():
        x = (y.detach() / math.sqrt(1 + rho**2)).clone().requires_grad_()
        eps = denoise(x, grid.time(level)).eps
        # v·(d eps/d y)·v = alpha·v·(d eps/d x)·v
        traces = []
        for k, v in enumerate(signs):
            (pulled,) = torch.autograd.grad((eps * v).sum(), x, retain_graph=k + 1 < len(signs))
            traces.append(
                (pulled * v).flatten(1).sum(1).to("cpu", torch.float64) * (rho / math.sqrt(1 + rho**2))
            )
    return rho * eps.detach(), torch.stack(traces)


def bound_bits(
    denoise: DenoiseFn,
    x0: Tensor,
    grid: TimeGrid,
    *,
    noise: NoiseFn,
    samples: int = 100,
    bin_width: float | None = None,
) -> Bits:
    """Return the variational bound on bits per dimension (VDM, arXiv:2107.00630, eq. 11–15).

    KL(q(x_T | x0) | N(0, 1)) + (lambda_max − lambda_min)·E ‖eps − eps_hat‖² + E[−log N(x0; y_0, rho_min²)],
    between the grid's first state and its last with noise, where y_0 = x0 + rho_min·eps. Time is
    continuous, and lambda is drawn from equal strata.

    Args:
        denoise: The denoiser.
        x0: The data, shape (B, *S).
        grid: The grid. Its first state must have finite sigma/alpha.
        noise: The noise; draw 2k is the k-th eps, and draw 2k + 1 gives its place in the stratum.
        samples: Number of strata. Default: 100.
        bin_width: As for `flow_bits`.

    Returns:
        The bits, and their standard error from the differences of neighbouring strata.

    Raises:
        ValueError: If ``samples`` is less than 2, or the grid starts at infinite sigma/alpha.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    lams = grid.lam[grid.sigma > 0]
    low, high = float(lams[0]), float(lams[-1])
    if math.isinf(low):
        raise ValueError("the grid must start at a finite sigma/alpha: the bound's integral runs over lambda")
    losses = []
    for k in range(samples):
        eps = noise(2 * k, x0)
        # (B,) uniform
        place = torch.special.ndtr(noise(2 * k + 1, x0).flatten(1)[:, 0].to("cpu", torch.float64))
        level = -(low + (k + place) / samples * (high - low))  # log rho
        alpha, sigma = (broadcast(value, x0) for value in alpha_sigma_of_level(level))
        with torch.no_grad():
            guess = denoise(forward_noise(x0, eps, alpha, sigma), grid.time(level)).eps
        # control variate: ‖eps‖² − D has mean 0; the weight alpha⁴ is the best for data N(0, 1)
        excess = _squared_norm(eps) - x0[0].numel()
        losses.append(
            (_squared_norm(eps - guess) - torch.sigmoid(-2 * level).square() * excess) * (high - low)
        )
    loss = torch.stack(losses)  # (samples, B)
    alpha_0, sigma_0 = grid.alpha_sigma(0)
    dims = x0[0].numel()
    prior = 0.5 * (alpha_0**2 * _squared_norm(x0) + dims * (sigma_0**2 - 1 - 2 * math.log(sigma_0)))
    reconstruction = 0.5 * dims * (1 + math.log(2 * math.pi) - 2 * high)
    scale = dims * math.log(2)
    bits = (prior + loss.mean(0) + reconstruction) / scale - (
        0 if bin_width is None else math.log2(bin_width)
    )
    spread = (loss.diff(dim=0).square().mean(0) / 2).sqrt()  # within strata, by neighbours
    return Bits(bits, spread / math.sqrt(samples) / scale)


def _squared_norm(x: Tensor) -> Tensor:
    """Return the squared norm of each sample, (B,) float64 on the CPU."""
    return x.flatten(1).to("cpu", torch.float64).square().sum(1)
