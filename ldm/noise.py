"""Noise that depends on the sample's seed and the step alone: not on the batch, the device or a restart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.types import NoiseFn


def _check(seeds: Sequence[int]) -> list[int]:
    seeds = [int(seed) for seed in seeds]
    if not seeds or any(not 0 <= seed < 2**64 for seed in seeds):
        raise ValueError(f"expected one or more seeds in [0, 2**64), got {seeds}")
    return seeds


def initial_noise(
    seeds: Sequence[int], shape: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal (len(seeds), *shape): sample i is ``torch.Generator().manual_seed(seeds[i])``'s, drawn on the CPU in float32."""
    drawn = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) for seed in _check(seeds)]
    return torch.stack(drawn).to(device, dtype)


def keyed_noise(seeds: Sequence[int]) -> NoiseFn:
    """A NoiseFn whose draw k for sample i depends on (seeds[i], k) alone.

    Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) takes the pair as its 128-bit key, so no two pairs
    share a stream; torch's own CPU generator would keep 32 bits of a seed. Drawn in float32 on the CPU.
    """
    seeds = _check(seeds)

    def noise(k: int, like: Tensor) -> Tensor:
        if len(like) != len(seeds):
            raise ValueError(f"noise for {len(seeds)} seeds was asked for a batch of {len(like)}")
        return torch.stack([keyed_normal(seed, k, like.shape[1:]) for seed in seeds]).to(like.device, like.dtype)

    return noise


def keyed_normal(seed: int, k: int, shape: Sequence[int]) -> Tensor:
    """Standard normal of a shape, float32 on the CPU, from the Philox stream with key (seed, k), both in [0, 2**64)."""
    key = np.array([seed, k], dtype=np.uint64)
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(np.asarray(values))
