"""Denoisers in closed form: Gaussian mixtures, whose score and probability flow are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.grid import TimeGrid
from ldm.prediction import target
from ldm.schedule import NoiseSchedule, broadcast
from ldm.types import Cond, Denoised, DenoiseFn, Prediction


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """sum_k weights[k]·N(means[k], stds[k]²·I) on vectors of D numbers; one component makes a Gaussian."""

    means: Tensor  # (K, D) float64
    stds: Tensor  # (K,)
    weights: Tensor  # (K,), summing to 1

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """(n, D) float64."""
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=g)
        return self.means[k] + self.stds[k, None] * torch.randn(n, self.means.shape[1], generator=g, dtype=torch.float64)

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t = x], (B, D); alpha and sigma broadcast against x."""
        responsibility, means = self._posterior(x, alpha, sigma)
        return (responsibility[..., None] * means).sum(1)

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a, s = alpha.reshape(-1, 1), sigma.reshape(-1, 1)  # (1 or B, 1)
        var = a**2 * self.stds**2 + s**2  # (., K)
        delta = x[:, None, :] - a[..., None] * self.means  # (B, K, D)
        logit = self.weights.log() - 0.5 * delta.square().sum(-1) / var - 0.5 * x.shape[1] * var.log()
        gain = a * self.stds**2 / var  # (., K)
        return logit.softmax(1), self.means + gain[..., None] * delta

    def denoise(self, schedule: NoiseSchedule) -> DenoiseFn:
        """The exact DenoiseFn of the data under a schedule."""

        def fn(x: Tensor, t: Tensor) -> Denoised:
            alpha, sigma = (broadcast(v, x) for v in schedule.alpha_sigma(t))
            x0 = self.x0(x, alpha, sigma)
            return Denoised(x0, (x - alpha * x0) / sigma)

        return fn

    def logp(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """log density of x_t, (B,) in nats."""
        var = alpha**2 * self.stds**2 + sigma**2  # (K,)
        square = (x[:, None, :] - alpha * self.means).square().sum(-1)  # (B, K)
        return (self.weights.log() - 0.5 * square / var - 0.5 * x.shape[1] * (2 * math.pi * var).log()).logsumexp(1)

    def flow(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """The probability flow's exact map of x (B, 1) from state (alpha, sigma) to another: in one dimension it keeps the quantile."""
        wanted = self._logit_cdf(x, *start)
        width = 40 * (abs(self.means).max() + self.stds.max() + 1)
        low, high = torch.full_like(x, -float(width)), torch.full_like(x, float(width))
        for _ in range(200):  # bisection to the last bit
            middle = (low + high) / 2
            above = self._logit_cdf(middle, *end) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def _logit_cdf(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """log(F/(1 − F)), which keeps its precision in both tails."""
        std = (alpha**2 * self.stds**2 + sigma**2).sqrt()
        z = (x - alpha * self.means[:, 0]) / std  # (B, K)
        below = (self.weights.log() + torch.special.log_ndtr(z)).logsumexp(1, keepdim=True)
        above = (self.weights.log() + torch.special.log_ndtr(-z)).logsumexp(1, keepdim=True)
        return below - above


def gaussian(mean: float = 0.5, std: float = 0.8, dims: int = 1) -> Mixture:
    """N(mean, std²·I)."""
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(means=torch.full((1, dims), mean, dtype=torch.float64), stds=std * one, weights=one)


def mixture() -> Mixture:
    """Three well-spread components on the line, wide enough that a hundred steps resolve the flow."""
    return Mixture(
        means=torch.tensor([[-1.2], [0.3], [1.5]], dtype=torch.float64),
        stds=torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64),
        weights=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    )


class AnalyticNet(nn.Module):
    """The network that a perfect training of ``prediction`` would give; Cond.pooled (B, D), where set, shifts the data."""

    def __init__(self, data: Mixture, schedule: NoiseSchedule, prediction: Prediction) -> None:
        super().__init__()
        self.data, self.schedule, self.prediction, self.calls = data, schedule, prediction, 0

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls += 1
        alpha, sigma = (broadcast(v, x) for v in self.schedule.alpha_sigma(t))
        shift = 0.0 if cond.pooled is None else cond.pooled.to(x.dtype)
        x0 = self.data.x0(x - alpha * shift, alpha, sigma) + shift
        return target(x0, (x - alpha * x0) / sigma, alpha, sigma, self.prediction)


def flow_error(data: Mixture, schedule: NoiseSchedule, grid: TimeGrid, run: Callable[[DenoiseFn, Tensor], Tensor]) -> float:
    """Root mean square of a solver's error against the exact flow from the grid's first state to its last, over 9 starting points."""
    x = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)[:, None]
    exact = data.flow(x, (float(grid.alpha[0]), float(grid.sigma[0])), (float(grid.alpha[-1]), float(grid.sigma[-1])))
    return float((run(data.denoise(schedule), x) - exact).square().mean().sqrt())


def slope(steps: list[int], errors: list[float]) -> float:
    """The order of convergence: minus the slope of log error against log steps, least squares."""
    x, y = torch.tensor(steps, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
