"""Time grids: the timesteps that a sampler visits, and the state it ends in.

A grid of N steps has N evaluations of the denoiser, at t_0 > … > t_(N−1), and N + 1 states: step i leads from
state i, where x = alpha_i·x0 + sigma_i·eps, to state i + 1. The noise level sigma/alpha decreases strictly.
The last state is usually clean data (alpha 1, sigma 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule, alpha_sigma_of_level, forward_noise
from ldm.diffusion.spacings import LEVEL_SPACINGS, SPACINGS, TIME_SPACINGS
from ldm.support.config import nearest
from ldm.support.defaults import as_tensor
from ldm.support.text import shown

Final = Literal["data", "first", "none"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TimeGrid:
    """N timesteps and the N + 1 states that they lead through; float64 on the CPU.

    Args:
        t: The timesteps of the evaluations, shape (N,), strictly decreasing, in [0, T − 1], may be
            fractional.
        alpha: alpha of the states, shape (N + 1,).
        sigma: sigma of the states, shape (N + 1,); sigma/alpha is strictly decreasing.
        schedule: The noise schedule of T timesteps.

    Raises:
        ValueError: If the shapes do not match, t is out of range, or t or sigma/alpha does not decrease.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        n = len(self.t)
        if n < 1 or self.alpha.shape != (n + 1,) or self.sigma.shape != (n + 1,):
            raise ValueError(
                f"{n} steps need alpha and sigma of shape ({n + 1},), got {self.alpha.shape} and"
                f" {self.sigma.shape}"
            )
        if not bool(((self.t >= 0) & (self.t <= len(self.schedule) - 1)).all()):
            raise ValueError(
                f"t must lie in [0, {len(self.schedule) - 1}], got {float(self.t.min())} to"
                f" {float(self.t.max())}"
            )
        if not bool((self.t.diff() < 0).all()) or not bool((self.ratio.diff() < 0).all()):
            raise ValueError("t and the noise level sigma/alpha must decrease strictly from step to step")

    def __len__(self) -> int:
        """Return N, the number of steps."""
        return len(self.t)

    @property
    def ratio(self) -> Tensor:
        """sigma/alpha of every state, shape (N + 1,): the sigma of Karras et al. 2022."""
        return self.sigma / self.alpha

    @property
    def lam(self) -> Tensor:
        """lambda = log(alpha/sigma) of every state, shape (N + 1,); +inf at clean data."""
        return -self.ratio.log()

    @staticmethod
    def make(
        schedule: NoiseSchedule,
        steps: int,
        *,
        spacing: str = "leading",
        offset: int = 0,
        final: Final = "data",
        drop_last: bool = False,
        integer: bool = True,
        rho: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> TimeGrid:
        """Return a grid of `steps` steps.

        Args:
            schedule: The noise schedule of T timesteps.
            steps: N, from 1 to T.
            spacing: A name of `ldm.diffusion.spacings`, which gives the formulas. Default: "leading".
            offset: Added to every timestep of the leading spacing. Default: 0.
            final: The state after the last evaluation: "data" (alpha 1, sigma 0), "first" (the schedule's
                entry 0), or "none" (the spacing has one node more, which is the final state). Default:
                "data".
            drop_last: Compute the spacing with one node more and drop that node. Always so for the ays
                spacings unless `final` is "none". Default: False.
            integer: Round the nodes of spacings in t to table entries. Default: True.
            rho: Exponent of karras (default 7) and polyexponential (default 1).
            sigma_min: Smallest sigma/alpha of spacings in the noise level. Default: the schedule's.
            sigma_max: Largest sigma/alpha of spacings in the noise level. Default: the schedule's.

        Raises:
            ValueError: For an unknown name, or a number of steps that the spacing cannot serve; the message
                names the nearest number that it can.
        """
        _check_names(spacing, final)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= len(schedule):
            raise ValueError(
                f"steps must be a whole number from 1 to {len(schedule)} (the schedule's T), got"
                f" {shown(steps)}"
            )
        drop_last = drop_last or (spacing.startswith("ays") and final != "none")

        def build(n: int) -> TimeGrid:
            count = n + 1 if drop_last or final == "none" else n
            kept = n if drop_last else count
            if spacing in LEVEL_SPACINGS:
                levels = _levels(schedule, spacing, count, rho, sigma_min, sigma_max)
                return TimeGrid.from_log_ratio(schedule, levels[:kept], final=final)
            times = TIME_SPACINGS[spacing](len(schedule), count, offset, integer)
            return TimeGrid.explicit(schedule, times[:kept], final=final)

        try:
            return build(steps)
        except ValueError as error:
            settings = f"spacing {spacing!r} with {steps} steps, offset {offset}, final {final!r}"
            advice = _advise_steps(build, steps, len(schedule))
            raise ValueError(f"{settings}: {error}; {advice}") from None

    @staticmethod
    def explicit(schedule: NoiseSchedule, t: Sequence[float] | Tensor, *, final: Final = "data") -> TimeGrid:
        """Return the grid of given timesteps.

        Args:
            schedule: The noise schedule of T timesteps.
            t: Strictly decreasing timesteps in [0, T − 1], which may be fractional.
            final: As for `make`; with "none" the last timestep is the final state. Default: "data".
        """
        times = as_tensor(t).to("cpu", torch.float64)
        return _with_final_state(schedule, times, *schedule.alpha_sigma(times), final)

    @staticmethod
    def from_log_ratio(
        schedule: NoiseSchedule, log_ratio: Sequence[float] | Tensor, *, final: Final = "data"
    ) -> TimeGrid:
        """Return the grid of given noise levels; t is interpolated between the schedule's entries.

        Args:
            schedule: The noise schedule.
            log_ratio: Strictly decreasing values of log(sigma/alpha).
            final: As for `make`; with "none" the last level is the final state. Default: "data".
        """
        levels = as_tensor(log_ratio).to("cpu", torch.float64)
        return _with_final_state(schedule, schedule.time(levels), *alpha_sigma_of_level(levels), final)

    def to_dict(self) -> dict[str, list[float]]:
        """Return t, alpha and sigma as lists, which `from_dict` restores exactly."""
        return {"t": self.t.tolist(), "alpha": self.alpha.tolist(), "sigma": self.sigma.tolist()}

    @staticmethod
    def from_dict(schedule: NoiseSchedule, values: Mapping[str, Sequence[float]]) -> TimeGrid:
        """Return the grid that `to_dict` wrote, under the schedule it was made for.

        Raises:
            ValueError: If the keys are not t, alpha and sigma.
        """
        if set(values) != {"t", "alpha", "sigma"}:
            raise ValueError(f"a grid is written as t, alpha and sigma, got {sorted(values)}")
        t, alpha, sigma = (
            torch.tensor(values[key], dtype=torch.float64, device="cpu") for key in ("t", "alpha", "sigma")
        )
        return TimeGrid(t=t, alpha=alpha, sigma=sigma, schedule=schedule)

    def time(self, log_ratio: Tensor | float) -> Tensor:
        """Return the fractional t of noise levels log(sigma/alpha); see `NoiseSchedule.time`."""
        return self.schedule.time(log_ratio)

    def time_of_state(self, i: int) -> Tensor:
        """Return t of state i, 0 … N, shape (); the last state must have noise."""
        return self.t[i] if i < len(self) else self.time(self.ratio[i].log())

    def alpha_sigma(self, i: int) -> tuple[float, float]:
        """Return alpha and sigma of state i, −N − 1 … N."""
        return float(self.alpha[i]), float(self.sigma[i])

    def add_noise(self, x0: Tensor, eps: Tensor, i: int = 0) -> Tensor:
        """Return state i of clean data x0 with noise eps, alpha_i·x0 + sigma_i·eps, shape (B, *S)."""
        return forward_noise(x0, eps, *self.alpha_sigma(i))

    def tail(self, strength: float) -> TimeGrid:
        """Return the last round(N·strength) steps, at least one; strength is in [0, 1]."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], got {strength}")
        return self.last(max(1, round(len(self) * strength)))

    def last(self, steps: int) -> TimeGrid:
        """Return the last `steps` steps, from 1 to N."""
        if not 1 <= steps <= len(self):
            raise ValueError(f"expected 1 to {len(self)} steps, got {steps}")
        return self.part(len(self) - steps, len(self))

    def part(self, start: int, end: int) -> TimeGrid:
        """Return the steps from state `start` to state `end`, 0 <= start < end <= N."""
        states = slice(start, end + 1)
        return replace(self, t=self.t[start:end], alpha=self.alpha[states], sigma=self.sigma[states])

    def from_ratio(self, ratio: float) -> TimeGrid:
        """Return the grid that starts at sigma/alpha of at most `ratio`.

        The states that are noisier are replaced by one state, at the schedule's last timestep that is not.
        The grid itself is returned if none is noisier.
        """
        if self.ratio[0] <= ratio:
            return self
        t = self.schedule.time(math.log(ratio)).floor()
        alpha, sigma = self.schedule.alpha_sigma(t)
        keep = int((self.t >= t).sum())  # the first state that is kept
        return replace(
            self,
            t=torch.cat([t[None], self.t[keep:]]),
            alpha=torch.cat([alpha[None], self.alpha[keep:]]),
            sigma=torch.cat([sigma[None], self.sigma[keep:]]),
        )


def _check_names(spacing: str, final: str) -> None:
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {shown(spacing)}; {nearest(spacing, SPACINGS)}")
    if final not in get_args(Final):
        raise ValueError(f"unknown final {shown(final)}; {nearest(final, get_args(Final))}")


def _levels(
    schedule: NoiseSchedule,
    spacing: str,
    count: int,
    rho: float | None,
    sigma_min: float | None,
    sigma_max: float | None,
) -> Tensor:
    """Return `count` decreasing values of log(sigma/alpha) by a spacing in the level, shape (count,)."""
    table = schedule.log_ratio
    low = float(table[0]) if sigma_min is None else math.log(sigma_min)
    high = float(table[-1]) if sigma_max is None else math.log(sigma_max)
    if math.isinf(high):
        raise ValueError(
            "the schedule has zero terminal SNR, so its largest sigma is infinite: give sigma_max, or use"
            " trailing"
        )
    if low >= high:
        raise ValueError(f"sigma_min {math.exp(low):.6g} must be below sigma_max {math.exp(high):.6g}")
    levels = LEVEL_SPACINGS[spacing](low, high, count, rho)
    levels[-1], levels[0] = low, high  # exactly; a single node is the noisiest
    return levels


def _with_final_state(
    schedule: NoiseSchedule, t: Tensor, alpha: Tensor, sigma: Tensor, final: Final
) -> TimeGrid:
    """Return the grid of the nodes t, alpha, sigma (each (N,)) and the final state."""
    if final == "none":
        return TimeGrid(t=t[:-1], alpha=alpha, sigma=sigma, schedule=schedule)
    bar = (
        schedule.alphas_cumprod[0] if final == "first" else torch.ones((), dtype=torch.float64, device="cpu")
    )
    if final == "first" and float(t[-1]) <= 0:
        raise ValueError(
            "the last timestep is 0 already, so final 'first' would repeat it: use final 'data' or an offset"
        )
    alpha = torch.cat([alpha, bar.sqrt()[None]])
    sigma = torch.cat([sigma, (1 - bar).sqrt()[None]])
    return TimeGrid(t=t, alpha=alpha, sigma=sigma, schedule=schedule)


def _advise_steps(build: Callable[[int], TimeGrid], steps: int, most: int) -> str:
    """Return the end of an error message: the number of steps nearest to a refused one that works."""
    for distance in range(1, most):
        for candidate in (steps - distance, steps + distance):
            if 1 <= candidate <= most:
                try:
                    build(candidate)
                except ValueError:
                    continue
                return f"the nearest number of steps that works is {candidate}"
    return "no number of steps works with these settings"
