"""A run that was stopped half way goes on to the bit, whatever history its sampler keeps."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from ldm.analysis.journal import Journal, journaled
from ldm.analysis.oracle import gaussian
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.diffusion.noise import initial_noise, keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import SAMPLERS

SCHEDULE = NoiseSchedule.scaled_linear()


class Killed(Exception):
    pass


def killed_after(denoise: DenoiseFn, calls: int) -> DenoiseFn:
    left = iter(range(calls))

    def fn(x: Tensor, t: Tensor) -> Denoised:
        if next(left, None) is None:
            raise Killed
        return denoise(x, t)

    return fn


@pytest.mark.parametrize("name", SAMPLERS)
def test_resumed_half_way(name: str) -> None:
    """Killed in the middle and started anew from the journal: the same noise and the same image to the bit,
    each evaluation made once."""
    grid, x = TimeGrid.make(SCHEDULE, 8, spacing="trailing"), initial_noise([3, 4], (3,), dtype=torch.float64)
    exact, calls = gaussian(dims=3).denoise(SCHEDULE), 0

    def counted(x: Tensor, t: Tensor) -> Denoised:
        nonlocal calls
        calls += 1
        return exact(x, t)

    drawn: list[dict[int, Tensor]] = [{}, {}]

    def run(denoise: DenoiseFn, kept: dict[int, Tensor]) -> Tensor:
        stream = keyed_noise([3, 4])
        return SAMPLERS[name](denoise, x, grid, noise=lambda k, like: kept.setdefault(k, stream(k, like)))

    whole = run(counted, drawn[0])
    total, calls = calls, 0
    journal: Journal = []
    with pytest.raises(Killed):
        run(journaled(killed_after(counted, total // 2), journal), {})
    assert len(journal) == calls == total // 2
    file = io.BytesIO()  # another process reads it
    torch.save([(t, tuple(d)) for t, d in journal], file)
    file.seek(0)
    kept: Journal = [(t, Denoised(*d)) for t, d in torch.load(file, weights_only=True)]
    assert torch.equal(run(journaled(counted, kept), drawn[1]), whole)
    assert calls == total == len(kept)
    assert drawn[0].keys() == drawn[1].keys() and all(torch.equal(drawn[0][k], drawn[1][k]) for k in drawn[0])


def test_the_journal_of_another_run_is_refused() -> None:
    exact, x = gaussian(dims=3).denoise(SCHEDULE), torch.zeros(2, 3, dtype=torch.float64)
    journal: Journal = []
    SAMPLERS["ddim"](journaled(exact, journal), x, TimeGrid.make(SCHEDULE, 4))
    with pytest.raises(ValueError, match="journal of another run"):
        SAMPLERS["ddim"](journaled(exact, journal), x, TimeGrid.make(SCHEDULE, 5))
    with pytest.raises(ValueError, match="journal of another run"):
        SAMPLERS["ddim"](journaled(exact, journal), x[:1], TimeGrid.make(SCHEDULE, 4))
