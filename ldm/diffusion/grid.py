"""Time grids: which timesteps a sampler visits, and where its last step ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule
from ldm.support.config import nearest

Final = Literal["data", "first", "none"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TimeGrid:
    """N evaluations at t (N,), from state 0 to state N; alpha and sigma (N + 1,) are the states', sigma/alpha
    falling strictly.

    All float64 on the CPU. ``log_ratio`` (T,) is the schedule's table of log(sigma/alpha), which ``time``
    reads backwards.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_ratio: Tensor

    def __post_init__(self) -> None:
        n = len(self.t)
        if n < 1 or self.alpha.shape != (n + 1,) or self.sigma.shape != (n + 1,):
            raise ValueError(
                f"{n} steps need alpha and sigma of shape ({n + 1},), got {self.alpha.shape} and"
                f" {self.sigma.shape}"
            )
        if not bool(((self.t >= 0) & (self.t <= len(self.log_ratio) - 1)).all()):
            raise ValueError(
                f"t must lie in [0, {len(self.log_ratio) - 1}], got {float(self.t.min())} to"
                f" {float(self.t.max())}"
            )
        if not bool((self.t.diff() < 0).all()) or not bool((self.ratio.diff() < 0).all()):
            raise ValueError(
                "t and the noise level sigma/alpha must fall strictly from step to step: a step is repeated"
                " or goes back"
            )

    def __len__(self) -> int:
        """N, the number of steps."""
        return len(self.t)

    @property
    def ratio(self) -> Tensor:
        """sigma/alpha of every state, (N + 1,): the sigma of Karras et al.'s formulation."""
        return self.sigma / self.alpha

    @property
    def lam(self) -> Tensor:
        """lambda = log(alpha/sigma) of every state, (N + 1,); +inf at clean data."""
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
        """A grid of ``steps`` steps.

        Spacings in t, for a schedule of T entries: ``leading`` i·(T//N) + offset; ``trailing`` T − i·T/N − 1;
        ``linspace`` from T − 1 to 0; ``sgm`` T − 1 − i·(T − 1)/N, rounded down; ``lcm`` N of the 50 timesteps
        that consistency models are distilled at, k·(T//50) − 1. They are rounded to table entries unless
        ``integer`` is False (leading is whole anyway). Spacings in sigma/alpha from ``sigma_max`` to
        ``sigma_min`` (by default the table's ends): ``karras`` (arXiv:2206.00364, eq. 5, rho 7),
        ``exponential`` (uniform in its logarithm), ``polyexponential`` (rho 1), and ``lambda``, another name
        of exponential. ``ays_sd1``, ``ays_sdxl``: Align Your Steps' tables (arXiv:2404.14507), which end in a
        level that is left out (as by ``drop_last``). ``final``: after the last evaluation the state is
        ``data`` (alpha 1, sigma 0), ``first`` (alpha-bar[0]), or ``none``: the spacing lays one node more,
        which is the final state, and no step leads further. ``drop_last`` lays one node more and leaves it
        out.

        Raises ValueError for a number of steps that the spacing cannot serve, naming the nearest one that it
        can.
        """
        _check_names(spacing, final)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= len(schedule):
            raise ValueError(
                f"steps must be a whole number from 1 to {len(schedule)} (the schedule's length), got"
                f" {steps!r}"
            )

        drop_last = drop_last or (spacing.startswith("ays") and final != "none")

        def build(n: int) -> TimeGrid:
            count = n + 1 if drop_last or final == "none" else n
            if spacing in SIGMA_SPACINGS:
                low, high = _sigma_range(schedule, sigma_min, sigma_max)
                log_ratio = SIGMA_SPACINGS[spacing](low, high, count, rho)
                log_ratio[-1], log_ratio[0] = low, high  # to the last bit; a single node is the noisiest
                return TimeGrid.from_log_ratio(
                    schedule, log_ratio[:n] if drop_last else log_ratio, final=final
                )
            t = TIME_SPACINGS[spacing](len(schedule), count, offset, integer)
            return TimeGrid.explicit(schedule, t[:n] if drop_last else t, final=final)

        try:
            return build(steps)
        except ValueError as error:
            works = _nearest_working(build, steps, len(schedule))
            advice = (
                f"the nearest number of steps that works is {works}"
                if works
                else "no number of steps works with these settings"
            )
            raise ValueError(
                f"spacing {spacing!r} with {steps} steps, offset {offset}, final {final!r}: {error}; {advice}"
            ) from None

    @staticmethod
    def explicit(schedule: NoiseSchedule, t: Sequence[float] | Tensor, *, final: Final = "data") -> TimeGrid:
        """The grid of a list of falling timesteps, which may be fractional; with final ``none`` the last is
        the final state."""
        times = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.alpha_sigma(times)
        return _finish(schedule, times, alpha, sigma, final)

    @staticmethod
    def from_log_ratio(
        schedule: NoiseSchedule, log_ratio: Sequence[float] | Tensor, *, final: Final = "data"
    ) -> TimeGrid:
        """The grid of a list of falling log(sigma/alpha); t is interpolated between table entries; final as
        in ``explicit``."""
        levels = torch.as_tensor(log_ratio, dtype=torch.float64)
        t = _interpolate_time(schedule.log_ratio, levels)
        # alpha² = 1/(1 + e^(2r)), sigma² = 1/(1 + e^(−2r))
        return _finish(
            schedule, t, torch.sigmoid(-2 * levels).sqrt(), torch.sigmoid(2 * levels).sqrt(), final
        )

    def to_dict(self) -> dict[str, list[float]]:
        """t, alpha and sigma as plain lists, which ``from_dict`` reads back to the bit."""
        return {"t": self.t.tolist(), "alpha": self.alpha.tolist(), "sigma": self.sigma.tolist()}

    @staticmethod
    def from_dict(schedule: NoiseSchedule, values: Mapping[str, Sequence[float]]) -> TimeGrid:
        """The grid of ``to_dict`` under the schedule that it was made for; ValueError for other keys."""
        if set(values) != {"t", "alpha", "sigma"}:
            raise ValueError(f"a grid is written as t, alpha and sigma, got {sorted(values)}")
        t, alpha, sigma = (torch.tensor(values[key], dtype=torch.float64) for key in ("t", "alpha", "sigma"))
        return TimeGrid(t=t, alpha=alpha, sigma=sigma, log_ratio=schedule.log_ratio)

    def time(self, log_sigma_over_alpha: Tensor | float) -> Tensor:
        """t (fractional, float64) of log(sigma/alpha), linear between table entries; ValueError outside the
        table."""
        return _interpolate_time(self.log_ratio, torch.as_tensor(log_sigma_over_alpha, dtype=torch.float64))

    def state(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) of the schedule at t in [0, T − 1], log(sigma/alpha) being linear between table
        entries."""
        if not 0 <= t <= len(self.log_ratio) - 1:
            raise ValueError(f"t must lie in [0, {len(self.log_ratio) - 1}], got {t}")
        low = int(t)
        level = float(self.log_ratio[low])
        if t > low:
            level += (t - low) * (float(self.log_ratio[low + 1]) - level)
        ratio = torch.tensor(level, dtype=torch.float64)
        return float(torch.sigmoid(-2 * ratio).sqrt()), float(torch.sigmoid(2 * ratio).sqrt())

    def tail(self, strength: float) -> TimeGrid:
        """The last round(N·strength) steps, at least one; strength in [0, 1]."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], got {strength}")
        return self.last(max(1, round(len(self) * strength)))

    def last(self, steps: int) -> TimeGrid:
        """The last ``steps`` steps, from 1 to N."""
        if not 1 <= steps <= len(self):
            raise ValueError(f"expected 1 to {len(self)} steps, got {steps}")
        return replace(
            self, t=self.t[-steps:], alpha=self.alpha[-steps - 1 :], sigma=self.sigma[-steps - 1 :]
        )

    def from_ratio(self, ratio: float) -> TimeGrid:
        """The grid begun at sigma/alpha of at most ``ratio``: noisier states give way to one, at the table's
        last timestep that is not noisier."""
        if self.ratio[0] <= ratio:
            return self
        first = float(self.time(math.log(ratio)).floor())
        alpha, sigma = self.state(first)
        keep = int((self.t >= first).sum())
        begun = {"t": first, "alpha": alpha, "sigma": sigma}
        return replace(
            self,
            **{
                name: torch.cat([self.t.new_tensor([value]), getattr(self, name)[keep:]])
                for name, value in begun.items()
            },
        )


def _leading(T: int, n: int, offset: int, integer: bool) -> Tensor:
    step = T // n
    if T - n * step > T // 10:
        raise ValueError(
            f"steps of {T}//{n} = {step} would leave the noisiest {T - (n - 1) * step} of {T} timesteps out"
        )
    if (n - 1) * step + offset > T - 1:
        raise ValueError(
            f"the first timestep would be {(n - 1) * step + offset}, beyond the schedule's last, {T - 1}"
        )
    return torch.arange(n - 1, -1, -1, dtype=torch.float64) * step + offset


def _trailing(T: int, n: int, offset: int, integer: bool) -> Tensor:
    t = T - torch.arange(n, dtype=torch.float64) * T / n
    return (t.round() if integer else t) - 1


def _linspace(T: int, n: int, offset: int, integer: bool) -> Tensor:
    t = torch.linspace(T - 1, 0, n, dtype=torch.float64)
    return t.round() if integer else t


def _sgm(T: int, n: int, offset: int, integer: bool) -> Tensor:
    t = T - 1 - torch.arange(n, dtype=torch.float64) * (T - 1) / n
    return t.floor() if integer else t


def _lcm(T: int, n: int, offset: int, integer: bool) -> Tensor:
    if T < 50 or n > 50:
        raise ValueError(f"it picks among the 50 timesteps of distillation, got {n} of {T}")
    kept = torch.arange(n) * 50 // n  # counted from the noisiest
    return ((50 - kept) * (T // 50) - 1).double()


def _karras(low: float, high: float, n: int, rho: float | None) -> Tensor:
    rho = 7.0 if rho is None else rho
    a, b = math.exp(high / rho), math.exp(low / rho)  # sigma^(1/rho)
    return (a + _ramp(n) * (b - a)).log() * rho


def _exponential(low: float, high: float, n: int, rho: float | None) -> Tensor:
    return high + _ramp(n) * (low - high)


def _polyexponential(low: float, high: float, n: int, rho: float | None) -> Tensor:
    return low + (1 - _ramp(n)) ** (1.0 if rho is None else rho) * (high - low)


def _align_your_steps(table: tuple[float, ...]) -> Callable[[float, float, int, float | None], Tensor]:
    """The table's sigma/alpha, log-linear between its entries; its rounded ends are the schedule's own."""

    def nodes(low: float, high: float, n: int, rho: float | None) -> Tensor:
        logs = torch.tensor(table, dtype=torch.float64).log()
        place = _ramp(n) * (len(logs) - 1)
        index = place.floor().long().clamp(max=len(logs) - 2)
        return (logs[index] + (place - index) * (logs[index + 1] - logs[index])).clamp(low, high)

    return nodes


def _ramp(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)


# Align Your Steps, arXiv:2404.14507, the optimised noise levels for ten steps
AYS_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
TIME_SPACINGS: dict[str, Callable[[int, int, int, bool], Tensor]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "sgm": _sgm,
    "lcm": _lcm,
}
SIGMA_SPACINGS: dict[str, Callable[[float, float, int, float | None], Tensor]] = {
    "karras": _karras,
    "exponential": _exponential,
    "polyexponential": _polyexponential,
    "lambda": _exponential,
    "ays_sd1": _align_your_steps(AYS_SD1),
    "ays_sdxl": _align_your_steps(AYS_SDXL),
}
SPACINGS: tuple[str, ...] = (*TIME_SPACINGS, *SIGMA_SPACINGS)


def _check_names(spacing: str, final: str) -> None:
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}; {nearest(spacing, SPACINGS)}")
    if final not in get_args(Final):
        raise ValueError(f"unknown final {final!r}; {nearest(final, get_args(Final))}")


def _sigma_range(
    schedule: NoiseSchedule, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
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
    return low, high


def _finish(schedule: NoiseSchedule, t: Tensor, alpha: Tensor, sigma: Tensor, final: Final) -> TimeGrid:
    """The grid of the nodes t with their states and the final state."""
    if final == "none":
        return TimeGrid(t=t[:-1], alpha=alpha, sigma=sigma, log_ratio=schedule.log_ratio)
    bar = schedule.alphas_cumprod[0] if final == "first" else torch.ones((), dtype=torch.float64)
    if final == "first" and float(t[-1]) <= 0:
        raise ValueError(
            "the last timestep is 0 already, so final 'first' would repeat it: use final 'data' or an offset"
        )
    alpha = torch.cat([alpha, bar.sqrt()[None]])
    sigma = torch.cat([sigma, (1 - bar).sqrt()[None]])
    return TimeGrid(t=t, alpha=alpha, sigma=sigma, log_ratio=schedule.log_ratio)


def _interpolate_time(table: Tensor, log_ratio: Tensor) -> Tensor:
    """Where log_ratio stands in the rising table, as a fractional index."""
    slack = 1e-9  # of the logarithm: what rounding may add at the ends of the table
    low, high = float(table[0]), float(table[-1])
    if not bool(((log_ratio >= low - slack) & (log_ratio <= high + slack)).all()):
        found = f"from {math.exp(float(log_ratio.min())):.6g} to {math.exp(float(log_ratio.max())):.6g}"
        raise ValueError(
            f"sigma/alpha must lie in the schedule's [{math.exp(low):.6g}, {math.exp(high):.6g}], got {found}"
        )
    if len(table) == 1:
        return torch.zeros_like(log_ratio)
    value = log_ratio.clamp(low, high)
    index = torch.searchsorted(table, value, right=True).clamp(max=len(table) - 1) - 1
    below, above = table[index], table[index + 1]
    if bool((above.isinf() & value.isfinite() & (value > below)).any()):
        raise ValueError(
            "sigma/alpha lies between the last two entries of a zero-terminal-SNR schedule, where t is not"
            " defined"
        )
    fraction = torch.where(
        value == below, 0.0, torch.where(value == above, 1.0, (value - below) / (above - below))
    )
    return index + fraction


def _nearest_working(build: Callable[[int], TimeGrid], steps: int, most: int) -> int | None:
    """The number of steps nearest to one that was refused, which is not."""
    for distance in range(1, most):
        for candidate in (steps - distance, steps + distance):
            if 1 <= candidate <= most:
                try:
                    build(candidate)
                except ValueError:
                    continue
                return candidate
    return None
