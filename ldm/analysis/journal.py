"""Going on with an interrupted run, for every sampler alike: what the network has said is kept, and not asked
again."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.interfaces import Denoised, DenoiseFn

Journal = list[tuple[Tensor, Denoised]]  # (t, answer) of every evaluation, in order


def journaled(denoise: DenoiseFn, journal: Journal) -> DenoiseFn:
    """``denoise`` that takes its first answers from the journal and appends every new one to it.

    Call the sampler again with the same x, grid, noise and options: it comes to the state where the run
    stopped without one evaluation, its history as it was, and goes on from there; the result is that of a run
    without a stop, bit for bit. ``torch.save`` can keep a journal. Use a new ``journaled`` for every run.
    Raises ValueError where the journal is of another run: other t, or another shape.
    """
    calls = 0

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        nonlocal calls
        if calls == len(journal):
            journal.append((torch.as_tensor(t).clone(), denoise(x_t, t)))
        kept_t, d = journal[calls]
        if not torch.equal(kept_t, torch.as_tensor(t)) or d.x0.shape != x_t.shape:
            raise ValueError(
                f"evaluation {calls} is at t {t} with x of shape {tuple(x_t.shape)}, but the journal's is at"
                f" t {kept_t} with {tuple(d.x0.shape)}: it is the journal of another run"
            )
        calls += 1
        return d

    return fn
