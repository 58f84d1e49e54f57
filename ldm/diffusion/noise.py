"""Noise that depends on the sample's seed and the step alone: not on the batch, the device or a restart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import NoiseFn


def _check(seeds: Sequence[int]) -> list[int]:
    seeds = [int(seed) for seed in seeds]
    if not seeds or any(not 0 <= seed < 2**64 for seed in seeds):
        raise ValueError(f"expected one or more seeds in [0, 2**64), got {seeds}")
    return seeds


def initial_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal (len(seeds), *shape): sample i is ``torch.Generator().manual_seed(seeds[i])``'s, drawn
    on the CPU in float32."""
    drawn = [
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        for seed in _check(seeds)
    ]
    return torch.stack(drawn).to(device, dtype)


def keyed_noise(seeds: Sequence[int]) -> NoiseFn:
    """A NoiseFn whose draw k for sample i depends on (seeds[i], k) alone.

    Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) takes the pair as its
    128-bit key, so no two pairs share a stream; torch's own CPU generator would keep 32 bits of a seed. Drawn
    in float32 on the CPU.
    """
    seeds = _check(seeds)

    def noise(k: int, like: Tensor) -> Tensor:
        if len(like) != len(seeds):
            raise ValueError(f"noise for {len(seeds)} seeds was asked for a batch of {len(like)}")
        return torch.stack([keyed_normal(seed, k, like.shape[1:]) for seed in seeds]).to(
            like.device, like.dtype
        )

    return noise


def keyed_normal(seed: int, k: int, shape: Sequence[int]) -> Tensor:
    """Standard normal of a shape, float32 on the CPU, from the Philox stream with key (seed, k), both in [0,
    2**64)."""
    key = np.array([seed, k], dtype=np.uint64)
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(np.asarray(values))


# lambda between which a Brownian path is bisected; before it the path starts, behind it nobody asks
LEVELS = (-16.0, 16.0)
DEPTH = 24  # bisections: 2e-6 in lambda, a ten-thousandth of the shortest step
NODES = 2**63  # Philox keys of the path, apart from those of keyed_noise


def brownian_noise(seeds: Sequence[int], grid: TimeGrid, *, inner: float | None = None) -> NoiseFn:
    """A NoiseFn of Brownian increments, so that one seed on grids of different length takes the same path.

    Draw i is (W(s') − W(s))/sqrt(s' − s) between states i and i + 1, with s = alpha²/sigma², the time in
    which the noise of a step of a variance-preserving SDE is exactly Brownian: sigma'·sqrt(1 − e^(−2h))·z =
    sigma'²/alpha'·(W(s') − W(s)). With ``inner`` = r (0 < r <= 1; for dpmpp_sde) draw 2i leads from state i
    to the inner level and draw 2i + 1 to state i + 1. Drawn in float32 on the CPU, summed in float64: W is a
    tree of midpoints keyed by (seed, node)  (Kidger et al., arXiv:2105.13493, section 4).
    """
    seeds = _check(seeds)
    lams = grid.lam.tolist()

    def noise(k: int, like: Tensor) -> Tensor:
        if len(like) != len(seeds):
            raise ValueError(f"noise for {len(seeds)} seeds was asked for a batch of {len(like)}")
        i = k if inner is None else k // 2
        start, end = lams[i], lams[i + 1]
        if inner is not None and k % 2 == 0:
            end = (1 - inner) * start + inner * end
        if math.isinf(end):
            raise ValueError(f"step {i} ends at clean data, where no noise is added")
        length = math.sqrt(math.exp(2 * end) - math.exp(2 * start))
        drawn = [
            (brownian(seed, end, like.shape[1:]) - brownian(seed, start, like.shape[1:])) / length
            for seed in seeds
        ]
        return torch.stack(drawn).to(like.device, like.dtype)

    return noise


def brownian(seed: int, lam: float, shape: Sequence[int]) -> Tensor:
    """W at time e^(2·lam) of the path of a seed, float64 on the CPU; W(0) = 0 at lam −inf. Bisected in lam,
    bridged in time."""
    if lam == -math.inf:
        return torch.zeros(tuple(shape), dtype=torch.float64)
    low, high = LEVELS
    if not low <= lam <= high:
        raise ValueError(f"lambda must lie in [{low}, {high}], got {lam}")

    def normal(node: int) -> Tensor:
        return keyed_normal(seed, NODES + node, shape).double()

    time_low, time_high = math.exp(2 * low), math.exp(2 * high)
    w_low = math.sqrt(time_low) * normal(0)
    w_high = w_low + math.sqrt(time_high - time_low) * normal(2**62)
    node = 1
    for _ in range(DEPTH):
        middle = (low + high) / 2
        time = math.exp(2 * middle)
        part = (time - time_low) / (time_high - time_low)
        w = w_low + part * (w_high - w_low) + math.sqrt((time - time_low) * (1 - part)) * normal(node)
        if lam < middle:
            high, time_high, w_high, node = middle, time, w, 2 * node
        else:
            low, time_low, w_low, node = middle, time, w, 2 * node + 1
    return w_low + (math.exp(2 * lam) - time_low) / (time_high - time_low) * (w_high - w_low)
