"""Denoisers in closed form: Gaussian mixtures, whose score and probability flow are known exactly. What a
solver does is measured against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn, NoiseFn, Prediction
from ldm.diffusion.prediction import target
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import get_sampler

SolverOptions = Mapping[str, Any]
CHURN = {"s_churn": 10.0, "s_max": 5.0, "s_min": 0.1}
# Sampler, options, order of its error. UniPC's corrector gives one order more than UniP-p. PLMS takes equal
# steps for granted: the second is left.
DETERMINISTIC: tuple[tuple[str, SolverOptions, int], ...] = (
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("tcd", {"eta": 0.0}, 1),
    ("dpmpp_2m", {}, 2),
    ("heun", {}, 2),
    ("restart", {"restarts": ()}, 2),
    ("dpm2", {}, 2),
    ("plms", {}, 2),
    ("dpm2_a", {"eta": 0.0}, 2),
    ("dpmpp_2s_a", {"eta": 0.0}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "solver": "heun"}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 3),
    ("dpmpp_3m_sde", {"eta": 0.0, "curvature": "published"}, 2),
    ("lms", {"order": 1}, 1),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {"order": 4}, 4),
    ("deis", {"order": 1}, 1),
    ("deis", {"order": 2}, 2),
    ("deis", {"order": 3}, 3),
    ("unipc", {"order": 1, "lower_order_final": False}, 2),
    ("unipc", {"order": 1, "lower_order_final": False, "variant": "bh1"}, 2),
    ("unipc", {"order": 2, "lower_order_final": False}, 3),
    ("unipc", {"order": 2, "lower_order_final": False, "variant": "bh1"}, 3),
    ("unipc", {"order": 3, "lower_order_final": False}, 4),
    ("unipc", {"order": 3, "lower_order_final": False, "variant": "bh1"}, 4),
)
# Sampler, options, weak order (None: it has steps of its own), and steps that bring the bias below a standard
# error of 20,000 samples.
STOCHASTIC: tuple[tuple[str, SolverOptions, int | None, int], ...] = (
    ("ddpm", {"variance": "small"}, 1, 1000),
    ("ddpm", {"variance": "large"}, 1, 1000),
    ("ddim", {"eta": 1.0}, 1, 1000),
    ("ddim", {"eta": 0.5}, 1, 1000),
    ("euler_a", {}, 1, 1000),
    ("euler", CHURN, 1, 1000),
    ("heun", CHURN, 2, 300),
    ("dpm2", CHURN, 2, 300),
    ("dpm2_a", {}, 2, 300),
    ("dpmpp_2s_a", {}, 2, 300),
    ("dpmpp_sde", {}, 1, 1000),
    ("dpmpp_2m_sde", {}, 2, 300),
    ("dpmpp_2m_sde", {"solver": "heun"}, 2, 300),
    ("dpmpp_3m_sde", {}, 2, 300),
    ("restart", {"restarts": ((0.1, 2.0, 3, 40),)}, None, 300),
)


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
        return self.means[k] + self.stds[k, None] * torch.randn(
            n, self.means.shape[1], generator=g, dtype=torch.float64
        )

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t = x], (B, D); alpha and sigma broadcast against x."""
        a, s = alpha.reshape(-1, 1), sigma.reshape(-1, 1)  # (1 or B, 1)
        var = a**2 * self.stds**2 + s**2  # (1 or B, K)
        delta = x[:, None, :] - a[..., None] * self.means  # (B, K, D)
        logit = self.weights.log() - 0.5 * delta.square().sum(-1) / var - 0.5 * x.shape[1] * var.log()
        # of each component's posterior, (B, K, D)
        means = self.means + (a * self.stds**2 / var)[..., None] * delta
        return (logit.softmax(1)[..., None] * means).sum(1)

    def denoise(self, schedule: NoiseSchedule) -> DenoiseFn:
        """The exact DenoiseFn of the data under a schedule."""

        def fn(x: Tensor, t: Tensor) -> Denoised:
            alpha, sigma = schedule.alpha_sigma_like(t, x)
            x0 = self.x0(x, alpha, sigma)
            return Denoised(x0, (x - alpha * x0) / sigma)

        return fn

    def logp(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """log density of x_t, (B,) in nats."""
        var = alpha**2 * self.stds**2 + sigma**2  # (K,)
        square = (x[:, None, :] - alpha * self.means).square().sum(-1)  # (B, K)
        return (
            self.weights.log() - 0.5 * square / var - 0.5 * x.shape[1] * (2 * math.pi * var).log()
        ).logsumexp(1)

    def moments(self, alpha: float = 1.0, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of x_t."""
        var = alpha**2 * self.stds**2 + sigma**2  # (K,)
        mean = (self.weights[:, None] * alpha * self.means).sum(0)
        delta = alpha * self.means - mean
        spread = (self.weights * var).sum() * torch.eye(self.means.shape[1], dtype=torch.float64)
        return mean, torch.einsum("k,ki,kj->ij", self.weights, delta, delta) + spread

    def z_scores(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> dict[str, float]:
        """How many standard errors the mean, covariance and components' weights of samples x (B, D) of x_t
        are from the truth.

        The weights are counted by the nearest component: for components that lie well apart.
        """
        n, (mean, cov) = len(x), self.moments(alpha, sigma)
        scores = {
            f"mean {i}": float((x[:, i].mean() - mean[i]) / (cov[i, i] / n).sqrt()) for i in range(x.shape[1])
        }
        centred = x - mean
        for i in range(x.shape[1]):
            for j in range(i, x.shape[1]):
                product = centred[:, i] * centred[:, j]
                scores[f"cov {i}{j}"] = float((product.mean() - cov[i, j]) / (product.std() / math.sqrt(n)))
        nearest = (x[:, None] - alpha * self.means).square().sum(-1).argmin(1)
        share = torch.nn.functional.one_hot(nearest, len(self.weights)).double().mean(0)
        for k, w in enumerate(self.weights):
            scores[f"weight {k}"] = float((share[k] - w) / (w * (1 - w) / n).sqrt())
        return scores

    def flow(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """The probability flow's exact map of x (B, 1) from state (alpha, sigma) to another: in one dimension
        it keeps the quantile."""
        wanted = self._logit_cdf(x, *start)
        width = float(40 * (abs(self.means).max() + self.stds.max() + 1))
        low, high = torch.full_like(x, -width), torch.full_like(x, width)
        for _ in range(64):  # bisection to the last bit: 2·width/2^64 < 1e-16
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


def planar() -> Mixture:
    """Three components in the plane, at least 5 deviations apart, so that samples can be told apart."""
    return Mixture(
        means=torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.0, -2.0]], dtype=torch.float64),
        stds=torch.tensor([0.4, 0.5, 0.3], dtype=torch.float64),
        weights=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    )


class AnalyticNet(nn.Module):
    """The network that a perfect training of ``prediction`` would give; Cond.pooled (B, D), where set, shifts
    the data. ``calls`` counts."""

    def __init__(self, data: Mixture, schedule: NoiseSchedule, prediction: Prediction) -> None:
        super().__init__()
        self.data, self.schedule, self.prediction, self.calls = data, schedule, prediction, 0

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls += 1
        alpha, sigma = self.schedule.alpha_sigma_like(t, x)
        shift = 0.0 if cond.pooled is None else cond.pooled.to(x.dtype)
        x0 = self.data.x0(x - alpha * shift, alpha, sigma) + shift
        return target(x0, (x - alpha * x0) / sigma, alpha, sigma, self.prediction)


def flow_error(
    data: Mixture, schedule: NoiseSchedule, grid: TimeGrid, run: Callable[[DenoiseFn, Tensor], Tensor]
) -> float:
    """Root mean square of a solver's error against the exact flow from the grid's first state to its last,
    over 9 starting points."""
    x = torch.linspace(-1.6, 1.6, 9, dtype=torch.float64)[:, None]
    return float(
        (run(data.denoise(schedule), x) - data.flow(x, grid.alpha_sigma(0), grid.alpha_sigma(-1)))
        .square()
        .mean()
        .sqrt()
    )


def solver_error(
    sampler: str,
    options: SolverOptions,
    data: Mixture,
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    start: int = 0,
) -> float:
    """``flow_error`` of a sampler, its first ``start`` steps put on the exact flow: a multistep method shows
    its order once its history is right."""

    def run(fn: DenoiseFn, x: Tensor) -> Tensor:
        def exact(i: int, x_i: Tensor, d: Denoised) -> Tensor | None:
            return data.flow(x, grid.alpha_sigma(0), grid.alpha_sigma(i + 1)) if i < start else None

        return get_sampler(sampler)(fn, x, grid, on_step=exact, **options)

    return flow_error(data, schedule, grid, run)


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The order of convergence: minus the slope of log error against log steps, least squares."""
    x, y = torch.tensor(steps, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def settled_slope(
    steps: Sequence[int], errors: Sequence[float], *, change: float = 0.05
) -> tuple[float, int]:
    """The slope where it is asymptotic, and from which number of steps on that is.

    From the finest pair backwards, for as long as the slope of a pair differs by at most ``change`` from that
    of the next finer one. The rule does not look at the order that is expected.
    """
    local = [slope(steps[i : i + 2], errors[i : i + 2]) for i in range(len(steps) - 1)]
    first = len(local) - 1
    while first > 0 and abs(local[first - 1] - local[first]) <= change:
        first -= 1
    return slope(steps[first:], errors[first:]), steps[first]


def affine_moments(
    run: Callable[[Tensor, NoiseFn], Tensor], draws: int, mean: float, std: float
) -> tuple[float, float]:
    """Mean and deviation of what a stochastic solver makes of N(mean, std²) where its denoiser is affine (one
    Gaussian): exact, no sampling.

    The result is c + a·x + sum_k b_k·z_k. ``run(x (B, 1), noise)`` is called once with a batch of x = 0, x =
    1 and every unit draw, so c, a and b_k are read off; ``draws`` bounds the number of draws.
    """
    x = torch.zeros(draws + 2, 1, dtype=torch.float64)
    x[1] = 1

    def noise(k: int, like: Tensor) -> Tensor:
        if k >= draws:
            raise ValueError(f"draw {k} was asked for, but only {draws} were reckoned with")
        unit = torch.zeros_like(like)
        unit[k + 2] = 1
        return unit

    out = run(x, noise)[:, 0]
    c, a, b = out[0], out[1] - out[0], out[2:] - out[0]
    return float(c + a * mean), float((a**2 * std**2 + b.square().sum()).sqrt())


def solver_bias(
    sampler: str, options: SolverOptions, std: float, schedule: NoiseSchedule, grid: TimeGrid
) -> tuple[float, float, float]:
    """A stochastic sampler's exact errors of mean and deviation at the grid's end, and the true deviation
    there, for the data N(1, std²).

    From the exact state at the grid's beginning; no sampling (``affine_moments``).
    """
    denoise, (a, s), (b, e) = gaussian(1.0, std).denoise(schedule), grid.alpha_sigma(0), grid.alpha_sigma(-1)
    restarts = sum(item[2] for item in options.get("restarts", ()))

    def run(x: Tensor, noise: NoiseFn) -> Tensor:
        return get_sampler(sampler)(denoise, x, grid, noise=noise, **options)

    mean, deviation = affine_moments(run, 2 * len(grid) + restarts, a, math.hypot(a * std, s))
    truth = math.hypot(b * std, e)
    return mean - b, deviation - truth, truth
