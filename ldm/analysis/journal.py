"""Resume an interrupted run of any sampler by replaying recorded network outputs.

A journal holds the outputs of all evaluations of the network so far. Samplers are functions of their
denoiser, so it is enough to wrap the denoiser, and to write the journal in the sampler's `on_step` hook:

    path = Path("run.journal")
    journal = read_journal(path) if path.exists() else []
    denoise = journaled(cfg(denoiser, cond, uncond, 3.0), journal)
    x0 = SAMPLERS["dpmpp_2m"](denoise, x, grid, noise=noise, on_step=lambda *_: write_journal(path, journal))

When the same program is run again after an interruption, it repeats the recorded steps without evaluating the
network, with the sampler's history as it was, and continues. The result is bit-identical to that of an
uninterrupted run.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.support.defaults import as_tensor
from ldm.support.files import write_atomically
from ldm.support.text import shown
from ldm.weights.formats.pickles import read_pickle

Journal = list[tuple[Tensor, Denoised]]  # (t, output) of every evaluation, in order


def journaled(denoise: DenoiseFn, journal: Journal) -> DenoiseFn:
    """Return ``denoise`` with its first outputs taken from a journal, and every later one appended to it.

    The sampler must be called with the same x, grid, noise and options as in the recorded run. Each run needs
    a new ``journaled`` function, which raises ValueError if an evaluation differs from the recorded one in t
    or in shape.

    Args:
        denoise: The denoiser.
        journal: The journal: empty for a new run, or that of an interrupted one.
    """
    calls = 0

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        nonlocal calls
        if calls == len(journal):
            journal.append((as_tensor(t).clone(), denoise(x_t, t)))
        recorded_t, d = journal[calls]
        if not torch.equal(recorded_t, as_tensor(t)) or d.x0.shape != x_t.shape:
            raise ValueError(
                f"evaluation {calls} is at t {t} with x of shape {tuple(x_t.shape)}, but the journal has t"
                f" {recorded_t} and shape {tuple(d.x0.shape)}: it is the journal of another run"
            )
        calls += 1
        return d

    return fn


def write_journal(path: str | Path, journal: Journal) -> None:
    """Write a journal to a file, completely or not at all."""
    buffer = io.BytesIO()
    torch.save([(t, tuple(d)) for t, d in journal], buffer)
    write_atomically(Path(path), buffer.getvalue())


def read_journal(path: str | Path) -> Journal:
    """Return the journal in a file that `write_journal` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or no journal; the message names it.
    """
    rows = read_pickle(path, whole=True)
    if not isinstance(rows, list) or not all(isinstance(row, tuple) and _is_entry(*row) for row in rows):
        raise ValueError(f"{str(path)!r} is not a journal: expected times and outputs, got {shown(rows)}")
    return [(t, Denoised(*d)) for t, d in rows]


def _is_entry(t: object = None, d: object = None, *rest: object) -> bool:
    """Return whether an entry consists of a time, and estimates of which the last may be None."""
    if rest or not isinstance(t, Tensor) or not isinstance(d, tuple) or len(d) != 3:
        return False
    return all(isinstance(each, Tensor) for each in d[:2]) and isinstance(d[2], Tensor | None)
