"""A run that was interrupted is resumed bit-identical, whatever history its sampler keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.analysis.journal import Journal, journaled, read_journal, write_journal
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
def test_resumed_half_way(name: str, tmp_path: Path) -> None:
    """Interrupted in the middle and resumed in the same noise: the same result, each evaluation made once."""
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
    write_journal(tmp_path / "run.journal", journal)
    kept = read_journal(tmp_path / "run.journal")
    assert torch.equal(run(journaled(counted, kept), drawn[1]), whole)
    assert calls == total == len(kept)
    assert drawn[0].keys() == drawn[1].keys() and all(torch.equal(drawn[0][k], drawn[1][k]) for k in drawn[0])


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """The journal that the `on_step` hook writes resumes a run that is interrupted at any step."""
    grid, x, path = TimeGrid.make(SCHEDULE, 6), initial_noise([1], (3,), dtype=torch.float64), tmp_path / "j"
    exact = gaussian(dims=3).denoise(SCHEDULE)

    def run(denoise: DenoiseFn) -> Tensor:
        journal = read_journal(path) if path.exists() else []
        return SAMPLERS["dpmpp_2m"](
            journaled(denoise, journal), x, grid, on_step=lambda *_: write_journal(path, journal)
        )

    for calls in (2, 3):  # interrupted twice
        with pytest.raises(Killed):
            run(killed_after(exact, calls))
    assert len(read_journal(path)) == 5
    assert torch.equal(run(killed_after(exact, 1)), SAMPLERS["dpmpp_2m"](exact, x, grid))


def test_the_journal_of_another_run_is_refused() -> None:
    exact, x = gaussian(dims=3).denoise(SCHEDULE), torch.zeros(2, 3, dtype=torch.float64)
    journal: Journal = []
    SAMPLERS["ddim"](journaled(exact, journal), x, TimeGrid.make(SCHEDULE, 4))
    with pytest.raises(ValueError, match="journal of another run"):
        SAMPLERS["ddim"](journaled(exact, journal), x, TimeGrid.make(SCHEDULE, 5))
    with pytest.raises(ValueError, match="journal of another run"):
        SAMPLERS["ddim"](journaled(exact, journal), x[:1], TimeGrid.make(SCHEDULE, 4))


def test_a_file_that_is_no_journal_is_refused_by_name(tmp_path: Path) -> None:
    path, t, x = tmp_path / "run.journal", torch.ones(()), torch.ones(1, 2)
    write_journal(path, [(t, Denoised(x, x)), (t, Denoised(x, x, x))])
    data = path.read_bytes()
    assert [d.var_frac is None for _, d in read_journal(path)] == [True, False]
    damaged = bytearray(data)
    damaged[data.index(b"\x00\x00\x80?") + 2] ^= 1  # a bit of a number
    for content in (data[:-9], b"", bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.journal"):
            read_journal(path)
    for other in ({"a": x}, [x], [(t, x)], [(t, (x, x))], [(t, (x, x, 1))], [(1, (x, x, None))], [()]):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"run\.journal' is not a journal"):
            read_journal(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_journal(tmp_path / "nowhere")
