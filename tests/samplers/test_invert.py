"""Inversion: the noise that it finds leads back to the data."""

import pytest
import torch
from torch import Tensor

from ldm.analysis.oracle import gaussian, mixture
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers.invert import ddim_invert, edict, edict_invert
from ldm.samplers.ode.ddim import ddim

SCHEDULE = NoiseSchedule.scaled_linear()
X = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]


def test_fixed_point_inverts_ddim_exactly() -> None:
    denoise, grid = mixture().denoise(SCHEDULE), TimeGrid.make(SCHEDULE, 50, offset=1, final="first")
    noise = ddim_invert(denoise, X, grid, iterations=60)
    torch.testing.assert_close(ddim(denoise, noise, grid), X, rtol=0, atol=1e-9)


def test_one_iteration_approximates_better_with_more_steps() -> None:
    denoise, errors = mixture().denoise(SCHEDULE), []
    for steps in (50, 200):
        grid = TimeGrid.make(SCHEDULE, steps, offset=1, final="first")
        errors.append(float((ddim(denoise, ddim_invert(denoise, X, grid), grid) - X).abs().max()))
    assert errors[1] < 0.4 * errors[0] < 0.2


def test_inversion_finds_the_noise_of_the_exact_flow() -> None:
    data, grid = gaussian(), TimeGrid.make(SCHEDULE, 500, spacing="linspace", final="none")
    ends = [grid.alpha_sigma(i) for i in (-1, 0)]
    torch.testing.assert_close(
        ddim_invert(data.denoise(SCHEDULE), X, grid, iterations=20), data.flow(X, *ends), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("p", [1.0, 0.93])
def test_edict_is_inverted_up_to_rounding(p: float) -> None:
    denoise, grid = mixture().denoise(SCHEDULE), TimeGrid.make(SCHEDULE, 50, offset=1)
    x, y = edict_invert(denoise, X, X, grid, p=p)
    back: tuple[Tensor, Tensor] = edict(denoise, x, y, grid, p=p)
    for track in back:
        # rounding grows by 0.93^(−100) = 1,400 and by divisions by alpha
        torch.testing.assert_close(track, X, rtol=0, atol=1e-8)


def test_edict_approaches_ddim() -> None:
    denoise, grid = mixture().denoise(SCHEDULE), TimeGrid.make(SCHEDULE, 200, offset=1)
    x, y = edict(denoise, X, X, grid)
    torch.testing.assert_close(x, ddim(denoise, X, grid), rtol=0, atol=0.05)
    torch.testing.assert_close(x, y, rtol=0, atol=0.01)


def test_wrong_input() -> None:
    denoise, grid = mixture().denoise(SCHEDULE), TimeGrid.make(SCHEDULE, 2)
    with pytest.raises(ValueError, match="iterations"):
        ddim_invert(denoise, X, grid, iterations=0)
    with pytest.raises(ValueError, match="p must lie"):
        edict(denoise, X, X, grid, p=1.5)
