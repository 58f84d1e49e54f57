"""Time grids: every number of steps of every spacing, final states, and parts of grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from k_diffusion_sampling import k_sampling

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.spacings import SPACINGS

SCHEDULE = NoiseSchedule.scaled_linear()
T = 1000

# the noise levels for ten steps that the authors of Align Your Steps (arXiv:2404.14507) publish
AYS = {
    "ays_sd1": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "ays_sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
}


def reference(spacing: str, n: int, offset: int) -> list[float]:
    """Return t of every evaluation, from exact fractions or NumPy, without the library."""
    if spacing == "leading":
        return [i * (T // n) + offset for i in reversed(range(n))]
    if spacing == "trailing":
        return [round(T - Fraction(i * T, n)) - 1 for i in range(n)]
    if spacing == "linspace":
        return [999 - round(Fraction(i * 999, n - 1)) for i in range(n)] if n > 1 else [999]
    if spacing == "lcm":
        # LCMScheduler: of 19, 39, … 999 backwards, those at floor(linspace(0, 50, n, endpoint=False))
        return [list(range(19, 1000, 20))[::-1][math.floor(Fraction(50 * i, n))] for i in range(n)]
    if spacing == "sgm":  # np.linspace(999, 0, n, endpoint=False), rounded down
        return [math.floor(999 - Fraction(i * 999, n)) for i in range(n)]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2
    bar = np.cumprod(1 - betas)
    sigmas = np.sqrt((1 - bar) / bar)
    if spacing in AYS:
        # the published levels, log-linear in between, with the ends of the schedule; the last is dropped
        levels = np.exp(np.interp(np.linspace(0, 10, n + 1), np.arange(11), np.log(AYS[spacing]))).clip(
            sigmas[0], sigmas[-1]
        )
        levels[0], levels = sigmas[-1], levels[:-1]
        return list(np.interp(np.log(levels), np.log(sigmas), np.arange(T)))
    u = np.linspace(0, 1, n)
    if spacing == "karras":
        levels = (sigmas[-1] ** (1 / 7) + u * (sigmas[0] ** (1 / 7) - sigmas[-1] ** (1 / 7))) ** 7
    else:
        levels = np.exp(np.log(sigmas[-1]) * (1 - u) + np.log(sigmas[0]) * u)
    return list(np.interp(np.log(levels), np.log(sigmas), np.arange(T)))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps(spacing: str, offset: int) -> None:
    """1 to 1000 steps are equal to the reference, or refused with the nearest number that works."""
    refused, neighbours = [], []
    # lcm refuses all numbers above 50
    for n in [*range(1, 121), 400, T] if spacing == "lcm" else range(1, T + 1):
        try:
            grid = TimeGrid.make(SCHEDULE, n, spacing=spacing, offset=offset)
        except ValueError as error:
            refused.append(n)
            works = int(str(error).rsplit(" ", 1)[1])
            assert len(TimeGrid.make(SCHEDULE, works, spacing=spacing, offset=offset)) == works
            neighbours.append((n, works))
            continue
        t = grid.t.numpy()
        assert len(t) == len(grid) == n and t.min() >= 0 and t.max() <= T - 1
        assert (np.diff(t) < 0).all() and (np.diff(grid.ratio.numpy()) < 0).all()
        expected = reference(spacing, n, offset)
        if spacing == "linspace":  # a half may be rounded either way
            assert np.abs(t - (999 * (1 - np.arange(n) / max(n - 1, 1)))).max() <= 0.5 + 1e-9
        else:
            # levels: 1e-12 of log sigma over the table's smallest slope, 2e-3 per step
            np.testing.assert_allclose(
                t, expected, rtol=0, atol=0 if spacing in ("leading", "trailing", "sgm", "lcm") else 1e-8
            )
    for n, works in neighbours if spacing != "lcm" else ():  # nothing nearer works
        assert works not in refused and all(
            m in refused or not 1 <= m <= T for m in range(n - abs(n - works) + 1, n + abs(n - works))
        )
    # leading refuses strides that leave out more than a tenth of the schedule at the noisy end, or exceed it
    assert spacing in ("leading", "lcm") or not refused
    if spacing == "lcm":
        assert refused == [*range(51, 121), 400, T] and all(works == 50 for _, works in neighbours)
    if spacing == "leading":
        lost = [n for n in range(1, T + 1) if T - n * (T // n) > 100 or (n - 1) * (T // n) + offset > T - 1]
        assert refused == lost and 20 not in lost and 50 not in lost


VARIANTS = [
    {"final": "none"},
    {"final": "first"},
    {"drop_last": True},
    {"integer": False},
    {"integer": False, "drop_last": True},
]
SOME = [*range(1, 31), 100, 101, 333, 334, 500, 501, 900, 998, 999, 1000]


@pytest.mark.parametrize(
    "numbers", [SOME, pytest.param(range(1, T + 1), marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_with_every_ending(
    spacing: str, options: dict[str, Any], numbers: Sequence[int]
) -> None:
    """Grids have the right length, range and final state, or are refused with a number that works."""
    if options.get("final") == "first" and spacing not in ("leading", "trailing", "sgm", "lcm", *AYS):
        return  # their last timestep is the schedule's entry 0 already: test_final_states
    for n in [n for n in numbers if spacing != "lcm" or n < 110]:
        try:
            grid = TimeGrid.make(SCHEDULE, n, spacing=spacing, offset=1, **options)
        except ValueError as error:
            works = int(str(error).rsplit(" ", 1)[1])
            assert len(TimeGrid.make(SCHEDULE, works, spacing=spacing, offset=1, **options)) == works
            continue
        t = grid.t.numpy()
        assert len(t) == n and t.min() >= 0 and t.max() <= T - 1
        assert (np.diff(t) < 0).all() and (np.diff(grid.ratio.numpy()) < 0).all()
        assert (float(grid.sigma[-1]) == 0) == (options.get("final", "data") == "data")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_final_states(spacing: str) -> None:
    data = TimeGrid.make(SCHEDULE, 8, spacing=spacing, offset=1)
    assert (float(data.alpha[-1]), float(data.sigma[-1])) == (1, 0)
    assert math.isinf(float(data.lam[-1]))
    none = TimeGrid.make(SCHEDULE, 8, spacing=spacing, offset=1, final="none")
    assert len(none) == 8 and float(none.sigma[-1]) > 0
    drop = TimeGrid.make(SCHEDULE, 8, spacing=spacing, offset=1, drop_last=True)
    assert torch.equal(drop.t, none.t) and float(drop.sigma[-1]) == 0
    # spacings whose last evaluation is above the schedule's entry 0
    if spacing in ("leading", "trailing", "sgm", "lcm", *AYS):
        first = TimeGrid.make(SCHEDULE, 8, spacing=spacing, offset=1, final="first")
        assert float(first.alpha[-1] ** 2) == pytest.approx(float(SCHEDULE.alphas_cumprod[0]), rel=1e-15)
    else:
        with pytest.raises(ValueError, match="would repeat it"):
            TimeGrid.make(SCHEDULE, 8, spacing=spacing, final="first")


def test_states_are_the_schedule_at_t() -> None:
    for spacing in SPACINGS:
        grid = TimeGrid.make(SCHEDULE, 13, spacing=spacing)
        alpha, sigma = SCHEDULE.alpha_sigma(grid.t)
        torch.testing.assert_close(grid.alpha[:-1], alpha, rtol=1e-12, atol=0)
        torch.testing.assert_close(grid.sigma[:-1], sigma, rtol=1e-12, atol=0)


def test_karras_and_polyexponential_against_k_diffusion() -> None:
    sampling = k_sampling()
    low, high = (float(SCHEDULE.log_ratio[i].exp()) for i in (0, -1))
    for n in (1, 2, 10, 37):
        peer = sampling.get_sigmas_karras(n, low, high).double()
        # k-diffusion computes in float32
        torch.testing.assert_close(
            TimeGrid.make(SCHEDULE, n, spacing="karras").ratio, peer, rtol=3e-6, atol=0
        )
        peer = sampling.get_sigmas_polyexponential(n, low, high, rho=1.3).double()
        torch.testing.assert_close(
            TimeGrid.make(SCHEDULE, n, spacing="polyexponential", rho=1.3).ratio, peer, rtol=3e-6, atol=0
        )


def test_tail() -> None:
    grid = TimeGrid.make(SCHEDULE, 20, offset=1, final="first")
    assert grid.tail(1.0).t.tolist() == grid.t.tolist()
    for strength, n in ((0.75, 15), (0.5, 10), (0.01, 1), (0, 1)):
        tail = grid.tail(strength)
        assert (
            len(tail) == n
            and torch.equal(tail.t, grid.t[-n:])
            and torch.equal(tail.alpha, grid.alpha[-n - 1 :])
        )
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="strength"):
            grid.tail(wrong)


@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.cosine(1000), SCHEDULE.zero_terminal_snr()])
@pytest.mark.parametrize("steps", [4, 50, 1000])
def test_a_grid_that_starts_at_a_level(schedule: NoiseSchedule, steps: int) -> None:
    whole = TimeGrid.make(schedule, steps, spacing="trailing")
    begun = whole.from_ratio(10.0)
    assert float(begun.ratio[0]) <= 10.0 < float(schedule.log_ratio[int(begun.t[0]) + 1].exp())
    assert len(begun) == 1 + int((whole.t < begun.t[0]).sum()) < len(whole) + (steps < 1000)
    assert torch.equal(begun.t[1:], whole.t[-(len(begun) - 1) :]) and torch.equal(
        begun.alpha[1:], whole.alpha[-(len(begun) - 1) - 1 :]
    )
    assert begun.from_ratio(10.0) is begun and whole.from_ratio(float("inf")) is whole


def test_states_of_noised_data() -> None:
    grid = TimeGrid.make(SCHEDULE, 7, offset=1)
    x0, eps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for i in range(7):
        torch.testing.assert_close(grid.add_noise(x0, eps, i), SCHEDULE.add_noise(x0, grid.t[i], eps))
    assert torch.equal(grid.add_noise(x0, eps, 7), x0)
    with pytest.raises(ValueError, match="same shape"):
        grid.add_noise(x0, eps[:1])


def test_a_grid_is_restored_exactly() -> None:
    grid = TimeGrid.make(SCHEDULE, 7, spacing="karras")
    again = TimeGrid.from_dict(SCHEDULE, grid.to_dict())
    assert torch.equal(again.t, grid.t)
    assert torch.equal(again.alpha, grid.alpha) and torch.equal(again.sigma, grid.sigma)


def test_zero_terminal_snr() -> None:
    zero = SCHEDULE.zero_terminal_snr()
    grid = TimeGrid.make(zero, 10, spacing="trailing")
    assert float(grid.alpha[0]) == 0 and float(grid.t[0]) == 999
    with pytest.raises(ValueError, match="give sigma_max"):
        TimeGrid.make(zero, 10, spacing="karras")
    assert len(TimeGrid.make(zero, 10, spacing="karras", sigma_max=14.0)) == 10


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (0, {}, "from 1 to 1000"),
        (1001, {}, "from 1 to 1000"),
        (2.5, {}, "from 1 to 1000"),
        (10, {"spacing": "karas"}, "did you mean 'karras'"),
        (10, {"final": "zero"}, "unknown final 'zero'"),
        (1000, {"offset": 1}, "nearest number of steps that works is 999"),
        (700, {}, "nearest number of steps that works is 500"),
        (10, {"spacing": "karras", "sigma_min": 20.0}, "no number of steps works"),
    ],
)
def test_wrong_input(steps: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeGrid.make(SCHEDULE, steps, **options)  # type: ignore[arg-type]


def test_explicit_lists() -> None:
    grid = TimeGrid.explicit(SCHEDULE, [999, 500.5, 3])
    assert grid.t.tolist() == [999, 500.5, 3] and float(grid.sigma[-1]) == 0
    again = TimeGrid.from_log_ratio(SCHEDULE, grid.ratio[:-1].log())
    torch.testing.assert_close(again.t, grid.t, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="must decrease strictly"):
        TimeGrid.explicit(SCHEDULE, [999, 999, 3])
    with pytest.raises(ValueError, match=r"\[0, 999\]"):
        TimeGrid.explicit(SCHEDULE, [1000, 3])
