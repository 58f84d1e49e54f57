"""Exact denoisers: Gaussian mixtures, whose score and probability flow are known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.interfaces import Denoised, DenoiseFn, Prediction
from ldm.diffusion.prediction import target
from ldm.diffusion.schedule import NoiseSchedule


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
            n, self.means.shape[1], generator=g, dtype=torch.float64, device="cpu"
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
        spread = (self.weights * var).sum() * torch.eye(
            self.means.shape[1], dtype=torch.float64, device="cpu"
        )
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
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    return Mixture(
        means=torch.full((1, dims), mean, dtype=torch.float64, device="cpu"), stds=std * one, weights=one
    )


def mixture() -> Mixture:
    """Return three components on the line, wide enough that a hundred steps resolve the flow."""
    return Mixture(
        means=torch.tensor([[-1.2], [0.3], [1.5]], dtype=torch.float64, device="cpu"),
        stds=torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64, device="cpu"),
        weights=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64, device="cpu"),
    )


def planar() -> Mixture:
    """Return three components in the plane, at least 5 standard deviations apart."""
    return Mixture(
        means=torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.0, -2.0]], dtype=torch.float64, device="cpu"),
        stds=torch.tensor([0.4, 0.5, 0.3], dtype=torch.float64, device="cpu"),
        weights=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64, device="cpu"),
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
