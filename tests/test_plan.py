import pytest
import torch
from analytic import mixture

from ldm.grid import SPACINGS, TimeGrid
from ldm.plan import describe, evaluations
from ldm.samplers import SAMPLERS
from ldm.schedule import NoiseSchedule
from ldm.types import Denoised

SCHEDULE = NoiseSchedule.scaled_linear()
# evaluations of N steps whose last goes to clean data
COUNTS = {"plms": lambda n: n + (n > 1), **dict.fromkeys(("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde"), lambda n: 2 * n - 1)}


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "dpm_adaptive"])
def test_announced_is_counted(name: str, steps: int) -> None:
    calls = 0
    exact = mixture().denoise(SCHEDULE)

    def counting(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        nonlocal calls
        calls += 1
        return exact(x, t)

    for spacing in SPACINGS:
        grid, calls = TimeGrid.make(SCHEDULE, steps, spacing=spacing), 0
        SAMPLERS[name](counting, torch.zeros(2, 1, dtype=torch.float64), grid, noise=lambda k, like: like * 0)
        assert calls == evaluations(grid, name), spacing
        if name != "restart":
            assert calls == COUNTS.get(name, lambda n: n)(steps)


def test_describe_says_the_figures() -> None:
    grid = TimeGrid.make(SCHEDULE, 3, offset=1, final="first")
    text = describe(grid, "heun")
    lines = text.splitlines()
    assert lines[0] == "heun: 3 steps, 6 evaluations" and len(lines) == 2 + 4
    fields = lines[2].split()
    assert fields[:2] == ["0", "667"] and float(fields[2]) == pytest.approx(float(SCHEDULE.alphas_cumprod[667]), abs=1e-6)
    assert lines[-1].split()[1] == "end" and float(lines[-1].split()[2]) == pytest.approx(float(SCHEDULE.alphas_cumprod[0]), abs=1e-6)
    assert "tolerance" in describe(grid, "dpm_adaptive")
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        describe(grid, "huen")
