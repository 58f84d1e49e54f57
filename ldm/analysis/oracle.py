"""Exact denoisers of Gaussian mixtures, and the errors of samplers against them.

Score and probability flow of a Gaussian mixture are known in closed form.
"""

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
# Sampler, options, order of its error. UniPC's corrector gives one order more than UniP-p. PLMS assumes equal
# steps and is of order 2 without them.
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
# Sampler, options, weak order (None for a sampler with its own steps), and the number of steps that brings
# the bias below the standard error of 20,000 samples.
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
    """The density sum_k weights[k]·N(means[k], stds[k]²·I) of vectors of D numbers.

    Args:
        means: Means of the components, shape (K, D), float64.
        stds: Standard deviations, shape (K,), float64.
        weights: Weights, shape (K,), float64; they sum to 1.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return ``n`` samples, shape (n, D), float64."""
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=g)
        return self.means[k] + self.stds[k, None] * torch.randn(
            n, self.means.shape[1], generator=g, dtype=torch.float64
        )

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | x_t = x], shape (B, D); ``alpha`` and ``sigma`` are scalars or of shape (B, 1)."""
        a, s = alpha.reshape(-1, 1), sigma.reshape(-1, 1)  # (1 or B, 1)
        var = a**2 * self.stds**2 + s**2  # (1 or B, K)
        delta = x[:, None, :] - a[..., None] * self.means  # (B, K, D)
        logit = self.weights.log() - 0.5 * delta.square().sum(-1) / var - 0.5 * x.shape[1] * var.log()
        # posterior mean of each component, (B, K, D)
        means = self.means + (a * self.stds**2 / var)[..., None] * delta
        return (logit.softmax(1)[..., None] * means).sum(1)

    def denoise(self, schedule: NoiseSchedule) -> DenoiseFn:
        """Return the exact denoiser of the mixture under a schedule."""

        def fn(x: Tensor, t: Tensor) -> Denoised:
            alpha, sigma = schedule.alpha_sigma_like(t, x)
            x0 = self.x0(x, alpha, sigma)
            return Denoised(x0, (x - alpha * x0) / sigma)

        return fn

    def logp(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Return the log density of x_t at ``x``, shape (B,), in nats."""
        var = alpha**2 * self.stds**2 + sigma**2  # (K,)
        square = (x[:, None, :] - alpha * self.means).square().sum(-1)  # (B, K)
        return (
            self.weights.log() - 0.5 * square / var - 0.5 * x.shape[1] * (2 * math.pi * var).log()
        ).logsumexp(1)

    def moments(self, alpha: float = 1.0, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the mean (D,) and the covariance (D, D) of x_t."""
        var = alpha**2 * self.stds**2 + sigma**2  # (K,)
        mean = (self.weights[:, None] * alpha * self.means).sum(0)
        delta = alpha * self.means - mean
        spread = (self.weights * var).sum() * torch.eye(self.means.shape[1], dtype=torch.float64)
        return mean, torch.einsum("k,ki,kj->ij", self.weights, delta, delta) + spread

    def z_scores(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> dict[str, float]:
        """Return the errors of the moments and component weights of samples of x_t, in standard errors.

        Weights are estimated by the nearest component, which requires well separated components.

        Args:
            x: The samples, shape (B, D).
            alpha: Alpha of x_t. Default: 1.
            sigma: Sigma of x_t. Default: 0.
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
        """Return the exact map of the probability flow, which in one dimension preserves the quantile.

        Args:
            x: Points, shape (B, 1).
            start: Their (alpha, sigma).
            end: (alpha, sigma) of the result.
        """
        wanted = self._logit_cdf(x, *start)
        width = float(40 * (abs(self.means).max() + self.stds.max() + 1))
        low, high = torch.full_like(x, -width), torch.full_like(x, width)
        for _ in range(64):  # bisection to double precision: 2·width/2^64 < 1e-16
            middle = (low + high) / 2
            above = self._logit_cdf(middle, *end) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def _logit_cdf(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Return log(F/(1 − F)) of the distribution function F, which is precise in both tails."""
        std = (alpha**2 * self.stds**2 + sigma**2).sqrt()
        z = (x - alpha * self.means[:, 0]) / std  # (B, K)
        below = (self.weights.log() + torch.special.log_ndtr(z)).logsumexp(1, keepdim=True)
        above = (self.weights.log() + torch.special.log_ndtr(-z)).logsumexp(1, keepdim=True)
        return below - above


def gaussian(mean: float = 0.5, std: float = 0.8, dims: int = 1) -> Mixture:
    """Return the Gaussian N(mean, std²·I) in ``dims`` dimensions."""
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(means=torch.full((1, dims), mean, dtype=torch.float64), stds=std * one, weights=one)


def mixture() -> Mixture:
    """Return three components on the line, wide enough that a hundred steps resolve the flow."""
    return Mixture(
        means=torch.tensor([[-1.2], [0.3], [1.5]], dtype=torch.float64),
        stds=torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64),
        weights=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    )


def planar() -> Mixture:
    """Return three components in the plane, at least 5 standard deviations apart."""
    return Mixture(
        means=torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.0, -2.0]], dtype=torch.float64),
        stds=torch.tensor([0.4, 0.5, 0.3], dtype=torch.float64),
        weights=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    )


class AnalyticNet(nn.Module):
    """The network of a perfect training on a mixture.

    `Cond.pooled`, shape (B, D), shifts the data if it is given. ``calls`` counts the evaluations.

    Args:
        data: The mixture.
        schedule: The noise schedule.
        prediction: What the network predicts.
    """

    def __init__(self, data: Mixture, schedule: NoiseSchedule, prediction: Prediction) -> None:
        super().__init__()
        self.data, self.schedule, self.prediction, self.calls = data, schedule, prediction, 0

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the exact prediction for ``x`` (B, D) at ``t`` (B,)."""
        self.calls += 1
        alpha, sigma = self.schedule.alpha_sigma_like(t, x)
        shift = 0.0 if cond.pooled is None else cond.pooled.to(x.dtype)
        x0 = self.data.x0(x - alpha * shift, alpha, sigma) + shift
        return target(x0, (x - alpha * x0) / sigma, alpha, sigma, self.prediction)


def flow_error(
    data: Mixture, schedule: NoiseSchedule, grid: TimeGrid, run: Callable[[DenoiseFn, Tensor], Tensor]
) -> float:
    """Return the RMS error of a solver against the exact probability flow, over 9 starting points.

    Args:
        data: The mixture, in one dimension.
        schedule: The noise schedule.
        grid: The grid, whose first and last states are those of the flow.
        run: (denoiser, first state) -> last state.
    """
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
    """Return `flow_error` of a sampler.

    Args:
        sampler: Name of the sampler.
        options: Its options.
        data: The mixture, in one dimension.
        schedule: The noise schedule.
        grid: The grid.
        start: Number of first steps that are replaced by the exact flow, so that a multistep method starts
            with an exact history. Default: 0.
    """

    def run(fn: DenoiseFn, x: Tensor) -> Tensor:
        def exact(i: int, x_i: Tensor, d: Denoised) -> Tensor | None:
            return data.flow(x, grid.alpha_sigma(0), grid.alpha_sigma(i + 1)) if i < start else None

        return get_sampler(sampler)(fn, x, grid, on_step=exact, **options)

    return flow_error(data, schedule, grid, run)


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Return the order of convergence: minus the least-squares slope of log error against log steps."""
    x, y = torch.tensor(steps, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def settled_slope(
    steps: Sequence[int], errors: Sequence[float], *, change: float = 0.05
) -> tuple[float, int]:
    """Return the order of convergence in the asymptotic range, and the number of steps where that begins.

    The range extends from the finest pair backwards, as long as the slope of a pair differs by at most
    ``change`` from that of the next finer pair. It does not depend on the expected order.

    Args:
        steps: Numbers of steps, increasing.
        errors: The error for each.
        change: Largest change of slope between pairs. Default: 0.05.
    """
    local = [slope(steps[i : i + 2], errors[i : i + 2]) for i in range(len(steps) - 1)]
    first = len(local) - 1
    while first > 0 and abs(local[first - 1] - local[first]) <= change:
        first -= 1
    return slope(steps[first:], errors[first:]), steps[first]


def affine_moments(
    run: Callable[[Tensor, NoiseFn], Tensor], draws: int, mean: float, std: float
) -> tuple[float, float]:
    """Return the exact mean and standard deviation of a stochastic solver's result for an affine denoiser.

    For a single Gaussian, the result is c + a·x + sum_k b_k·z_k. The solver runs once with a batch of x = 0,
    x = 1 and every unit draw, which gives c, a and b_k.

    Args:
        run: (first state (B, 1), noise) -> last state (B, 1).
        draws: Upper bound of the number of draws of noise.
        mean: Mean of the first state.
        std: Standard deviation of the first state.

    Raises:
        ValueError: If the solver draws noise more often than ``draws``.
    """
    x = torch.zeros(draws + 2, 1, dtype=torch.float64)
    x[1] = 1

    def noise(k: int, like: Tensor) -> Tensor:
        if k >= draws:
            raise ValueError(f"draws: expected more than {k} for this solver, got {draws}")
        unit = torch.zeros_like(like)
        unit[k + 2] = 1
        return unit

    out = run(x, noise)[:, 0]
    c, a, b = out[0], out[1] - out[0], out[2:] - out[0]
    return float(c + a * mean), float((a**2 * std**2 + b.square().sum()).sqrt())


def solver_bias(
    sampler: str, options: SolverOptions, std: float, schedule: NoiseSchedule, grid: TimeGrid
) -> tuple[float, float, float]:
    """Return the exact bias of a stochastic sampler for data N(1, std²), by `affine_moments`.

    Args:
        sampler: Name of the sampler.
        options: Its options.
        std: Standard deviation of the data.
        schedule: The noise schedule.
        grid: The grid; the sampler starts from the exact distribution of its first state.

    Returns:
        Errors of the mean and of the standard deviation at the grid's end, and the true standard deviation
        there.
    """
    denoise, (a, s), (b, e) = gaussian(1.0, std).denoise(schedule), grid.alpha_sigma(0), grid.alpha_sigma(-1)
    restarts = sum(item[2] for item in options.get("restarts", ()))

    def run(x: Tensor, noise: NoiseFn) -> Tensor:
        return get_sampler(sampler)(denoise, x, grid, noise=noise, **options)

    mean, final_std = affine_moments(run, 2 * len(grid) + restarts, a, math.hypot(a * std, s))
    true_std = math.hypot(b * std, e)
    return mean - b, final_std - true_std, true_std
