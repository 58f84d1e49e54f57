from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldm.analysis.oracle import mixture
from ldm.analysis.plan import describe_grid, evaluations
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.spacings import SPACINGS
from ldm.samplers import SAMPLERS

SCHEDULE = NoiseSchedule.scaled_linear()
# evaluations of N steps, the last of which ends at clean data
COUNTS = {
    "plms": lambda n: n + (n > 1),
    **dict.fromkeys(("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde"), lambda n: 2 * n - 1),
}


def counted(name: str, grid: TimeGrid, schedule: NoiseSchedule = SCHEDULE, **options: Any) -> int:
    """Return how often a sampler evaluates the exact denoiser of a mixture, with real noise."""
    calls = 0
    exact = mixture().denoise(schedule)

    def counting(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        nonlocal calls
        calls += 1
        return exact(x, t)

    SAMPLERS[name](
        counting,
        torch.zeros(2, 1, dtype=torch.float64),
        grid,
        noise=lambda k, like: torch.randn_like(like),
        **options,
    )
    return calls


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "dpm_adaptive"])
def test_announced_is_counted(name: str, steps: int) -> None:
    for spacing in SPACINGS if steps < 20 else ("trailing", "karras"):
        grid = TimeGrid.make(SCHEDULE, steps, spacing=spacing)
        calls = counted(name, grid)
        assert calls == evaluations(grid, name), spacing
        if name != "restart":
            assert calls == COUNTS.get(name, lambda n: n)(steps)
    for grid in (
        TimeGrid.make(SCHEDULE, steps, spacing="karras", final="none"),
        TimeGrid.make(SCHEDULE, steps, offset=1, final="first"),
    ):
        assert counted(name, grid) == evaluations(grid, name)
        assert name != "plms" or evaluations(grid, name) == COUNTS["plms"](
            steps
        )  # a single step is a plain one
    zero = SCHEDULE.zero_terminal_snr()
    grid = TimeGrid.make(zero, steps, spacing="trailing")
    assert counted(name, grid, zero) == evaluations(grid, name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"eta": 1.0}),
        ("unipc", {"order": 3, "lower_order_final": False}),
        ("deis", {"order": 3}),
        ("lms", {"order": 2}),
        ("dpmpp_sde", {"r": 0.3}),
        ("dpm2_a", {"eta": 0.4}),
        ("dpmpp_2s_a", {"eta": 0.0}),
        ("heun", {"s_churn": 30.0}),
        ("dpm2", {"s_churn": 30.0}),
        ("restart", {"restarts": ((0.1, 2.0, 2, 3), (1.0, 4.0, 1, 2))}),
        ("restart", {"restarts": ()}),
    ],
)
def test_options_count_too(name: str, options: dict[str, Any]) -> None:
    for steps in (1, 2, 9):
        grid = TimeGrid.make(SCHEDULE, steps, spacing="karras")
        assert counted(name, grid, **options) == evaluations(grid, name, **options)


def test_describe_says_the_figures() -> None:
    grid = TimeGrid.make(SCHEDULE, 3, offset=1, final="first")
    text = describe_grid(grid, "heun")
    lines = text.splitlines()
    assert lines[0] == "heun: 3 steps, 6 evaluations" and len(lines) == 2 + 4
    fields = lines[2].split()
    bar = float(SCHEDULE.alphas_cumprod[667])
    assert fields[:2] == ["0", "667"]
    # alpha-bar, sigma, sigma/alpha, lambda, as many digits as are printed
    values = (bar, (1 - bar) ** 0.5, (1 / bar - 1) ** 0.5, -0.5 * math.log(1 / bar - 1))
    for field, value, digits in zip(fields[2:], values, (6, 5, 5, 4), strict=True):
        assert float(field) == pytest.approx(value, abs=0.6 * 10**-digits)
    assert lines[-1].split()[1] == "end" and float(lines[-1].split()[2]) == pytest.approx(
        float(SCHEDULE.alphas_cumprod[0]), abs=1e-6
    )
    assert "tolerance" in describe_grid(grid, "dpm_adaptive")
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        describe_grid(grid, "huen")
