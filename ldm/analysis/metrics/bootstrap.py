"""Bootstrap intervals (Efron 1979) of metrics over sets of images.

A resample gives image i the weight w_i, how often it was drawn. The Fréchet distance and the maximum mean
discrepancy of resamples are larger than those of the set, as those of a set are larger than those of its
distribution: drawn images repeat. The interval is therefore

    value + quantiles of (resampled value − mean of the resampled values),

which has the spread of the resamples, without their shift. It covers what other sets of as many images would
give. The shift, mean of the resampled values − value, estimates the bias of the value itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ldm.support.scalars import whole_number


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are computed.

    Args:
        resamples: Number of resamples, at least 20. Default: 200.
        level: Probability that an interval covers, in (0, 1). Default: 0.95.
        seed: Seed of the draws. Default: 0.
    """

    resamples: int = 200
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("resamples", self.resamples, least=20)
        whole_number("seed", self.seed, least=0)
        if not 0 < self.level < 1:
            raise ValueError(f"level: expected a probability in (0, 1), got {self.level}")

    def weights(self, n: int, stream: int = 0) -> np.ndarray:
        """Draw the weights of n images.

        Args:
            n: Number of images.
            stream: Tells the sets of one metric apart. Default: 0.

        Returns:
            Shape (resamples, n), float64, whole numbers whose rows sum to n.
        """
        rng = np.random.default_rng([self.seed, stream])
        return rng.multinomial(n, np.full(n, 1 / n), size=self.resamples).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric of one or two sets of images.

    Args:
        metric: Name of the metric.
        features: Name of the features that it compares.
        value: Its value.
        low: Lower end of the interval.
        high: Upper end of the interval.
        level: Probability that the interval covers.
        bias: Estimated bias of the value; 0 for an unbiased metric.
        generated: Number of generated images.
        reference: Number of reference images; None if the metric has none.
        better: Whether lower or higher values are better, "lower" or "higher".
        warnings: What limits the value, such as too few images. Default: nothing.
    """

    metric: str
    features: str
    value: float
    low: float
    high: float
    level: float
    bias: float
    generated: int
    reference: int | None
    better: str
    warnings: tuple[str, ...] = ()

    def bounded(self, low: float = -np.inf, high: float = np.inf) -> Estimate:
        """Return the estimate with its interval cut to the range of the metric."""
        return replace(
            self, low=float(np.clip(self.low, low, high)), high=float(np.clip(self.high, low, high))
        )


def estimate(
    metric: str,
    features: str,
    value: float,
    resampled: np.ndarray,
    bootstrap: Bootstrap,
    *,
    n: tuple[int, int | None],
    better: str = "lower",
    sampling_error: float = 0.0,
    unbiased: bool = False,
    warnings: tuple[str, ...] = (),
) -> Estimate:
    """Return a value with the interval of its resamples.

    Args:
        metric: Name of the metric.
        features: Name of the features.
        value: Its value.
        resampled: Its values on the resamples, shape (resamples,).
        bootstrap: Level of the interval.
        n: Number of generated images, and of reference images or None.
        better: "lower" or "higher". Default: "lower".
        sampling_error: Standard error of `value` itself, where it is a mean over random subsets; it widens
            the interval. Default: 0.
        unbiased: Whether the value has no bias. Default: False.
        warnings: What limits the value. Default: nothing.
    """
    deviations = resampled - resampled.mean()
    spread = float(deviations.std())
    if spread > 0:
        deviations = deviations * (1 + (sampling_error / spread) ** 2) ** 0.5
    tail = (1 - bootstrap.level) / 2
    below, above = np.quantile(deviations, [tail, 1 - tail])
    return Estimate(
        metric=metric,
        features=features,
        value=value,
        low=float(value + below),
        high=float(value + above),
        level=bootstrap.level,
        bias=0.0 if unbiased else float(resampled.mean() - value),
        generated=n[0],
        reference=n[1],
        better=better,
        warnings=warnings,
    )


def too_few(metric: str, n: tuple[int, ...], least: int, why: str) -> tuple[str, ...]:
    """Return a warning if the smallest set has fewer than `least` images, else nothing.

    Args:
        metric: Name of the metric.
        n: Numbers of images.
        least: Smallest number for which the metric is reliable.
        why: What happens below it.
    """
    if min(n) >= least:
        return ()
    return (f"{metric}: {min(n)} images, and below {least} {why}",)
