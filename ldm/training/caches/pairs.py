"""The pairs of a distillation: the noise that a model began with, and the latent that it drew from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.noise import initial_noise
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.protocol import Request
from ldm.training.caches.rows import CACHES, cached_rows

SHARD = 1024  # pairs of a file: what an interruption may lose


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Latents that a teacher drew, with their prompts; latent i has seed i.

    Args:
        prompts: N prompts.
        latents: The latents, (N, C, h, w) float16.
    """

    prompts: tuple[str, ...]
    latents: np.ndarray

    def noise(self, rows: Sequence[int]) -> Tensor:
        """Return the noise that latents were drawn from, (B, C, h, w) float32 on the CPU."""
        return initial_noise(rows, self.latents.shape[1:])

    def latent(self, rows: Sequence[int]) -> Tensor:
        """Return latents, (B, C, h, w) float32 on the CPU."""
        return torch.from_numpy(self.latents[np.asarray(rows)]).float()


def teacher_pairs(
    teacher: LatentDiffusion, prompts: Sequence[str], *, batch: int = 16, **options: Any
) -> Pairs:
    """Return the latents that a teacher draws of N prompts, from files that are computed once.

    Prompt i is drawn with seed i. A file holds 1024 pairs and is named by a hash of the teacher's weights,
    the prompts and the options; an interrupted computation resumes at the first file that is absent.

    Args:
        teacher: The model.
        prompts: N prompts.
        batch: Images at a time. Default: 16.
        options: Options of `LatentDiffusion.text_to_image`, such as `steps` and `guidance`.
    """
    parts = [range(start, min(start + SHARD, len(prompts))) for start in range(0, len(prompts), SHARD)]
    shape = teacher.stage.shape(teacher.settle("", **options))

    def compute(rows: Sequence[int]) -> Tensor:
        return draw_latents(teacher, [prompts[row] for row in rows], rows, **options)

    latents = []
    for rows in parts:
        content = [teacher.origin, [prompts[row] for row in rows], rows.start, options]
        key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
        latents.append(cached_rows(CACHES / f"pairs-{key}.npy", rows, shape, compute, batch=batch))
    return Pairs(prompts=tuple(prompts), latents=np.concatenate(latents))


@torch.no_grad()
def draw_latents(
    teacher: LatentDiffusion, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> Tensor:
    """Return the latents (B, C, h, w) that a model draws of B prompts with B seeds."""
    call = teacher.settle(list(prompts), seed=list(seeds), progress=False, **options)
    pair = teacher.paired(call, Request(task="text_to_image"))
    call, x = teacher.stage.begin(call)
    return teacher.stage.sample(call, x, pair)


@torch.no_grad()
def conditions(teacher: LatentDiffusion, prompts: Sequence[str], seeds: Sequence[int]) -> Cond:
    """Return the condition of B prompts with B seeds, in the dtype of the model, at batch B."""
    call = teacher.settle(list(prompts), seed=list(seeds), guidance=1.0, progress=False)
    return teacher.paired(call, Request(task="text_to_image"))[0]
