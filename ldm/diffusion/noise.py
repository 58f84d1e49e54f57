"""Noise that depends only on a sample's seed and the step, never on the batch, the device or a restart.

Initial noise comes from `torch.Generator().manual_seed(seed)`, so it equals that of other libraries. The
noise of step k comes from a counter-based generator keyed by (seed, k). Brownian noise is made of increments
of one path per seed, so that one seed gives similar images at different numbers of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import NoiseFn

# lambda between which a Brownian path is bisected; the path starts at the first, no schedule reaches the
# second
LEVELS = (-16.0, 16.0)
DEPTH = 24  # bisections: a resolution of 2e-6 in lambda, a ten-thousandth of the shortest step
NODES = 2**63  # first Philox key of the Brownian path, above the keys of keyed_noise


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    seeds = [int(seed) for seed in seeds]
    if not seeds or any(not 0 <= seed < 2**64 for seed in seeds):
        raise ValueError(f"expected one or more seeds in [0, 2**64), got {seeds}")
    return seeds


def _check_batch(like: Tensor, seeds: Sequence[int]) -> None:
    if len(like) != len(seeds):
        raise ValueError(f"noise for {len(seeds)} seeds was requested for a batch of {len(like)}")


def initial_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return standard normal noise, one sample per seed, drawn on the CPU in float32.

    Args:
        seeds: B seeds in [0, 2**64); sample i is drawn from `torch.Generator().manual_seed(seeds[i])`.
        shape: *S, the shape of one sample.
        device: Where to put the result. Default: the CPU.
        dtype: Dtype of the result. Default: float32.

    Returns:
        The noise, shape (B, *S).
    """
    drawn = [
        torch.randn(
            *shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu"
        )
        for seed in _checked_seeds(seeds)
    ]
    return torch.stack(drawn).to(device, dtype)


def keyed_noise(seeds: Sequence[int]) -> NoiseFn:
    """Return a noise source whose draw k of sample i depends on (seeds[i], k) only.

    Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) uses the pair as its
    128-bit key, so no two pairs share a stream; PyTorch's CPU generator would use only 32 bits of the seed.
    Noise is drawn in float32 on the CPU.
    """
    seeds = _checked_seeds(seeds)

    def noise(k: int, like: Tensor) -> Tensor:
        _check_batch(like, seeds)
        drawn = [keyed_normal(seed, k, like.shape[1:]) for seed in seeds]
        return torch.stack(drawn).to(like.device, like.dtype)

    return noise


def keyed_normal(seed: int, k: int, shape: Sequence[int]) -> Tensor:
    """Return standard normal noise of the Philox stream with key (seed, k), float32 on the CPU.

    Args:
        seed: In [0, 2**64).
        k: Number of the draw, in [0, 2**64).
        shape: Shape of the result.
    """
    key = np.array([seed, k], dtype=np.uint64)
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(np.asarray(values))


def brownian_noise(seeds: Sequence[int], grid: TimeGrid, *, inner: float | None = None) -> NoiseFn:
    """Return a noise source of Brownian increments: one seed follows the same path on grids of any length.

    Draw i is (W(s') − W(s))/sqrt(s' − s) between states i and i + 1, in the time s = alpha²/sigma². In this
    time the noise of a step of a variance-preserving SDE is exactly Brownian:

        sigma'·sqrt(1 − e^(−2h))·z = sigma'²/alpha'·(W(s') − W(s)),   h = lambda' − lambda

    W is drawn in float32 on the CPU and summed in float64.

    Args:
        seeds: B seeds in [0, 2**64).
        grid: The time grid.
        inner: For dpmpp_sde, its `r` in (0, 1]: draw 2i leads from state i to the inner level at the fraction
            r of the step in lambda, and draw 2i + 1 to state i + 1. Default: None, one draw per step.
    """
    seeds = _checked_seeds(seeds)
    lams = grid.lam.tolist()

    def noise(k: int, like: Tensor) -> Tensor:
        _check_batch(like, seeds)
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
    """Return W at time e^(2·lam) of the Brownian path of a seed.

    The path is a tree of midpoints, bisected in lambda, each drawn from a Brownian bridge in time and keyed
    by (seed, node) (Kidger et al. 2021, arXiv:2105.13493, section 4).

    Args:
        seed: In [0, 2**64).
        lam: −inf, where W is 0, or a value in [−16, 16].
        shape: Shape of the result.

    Returns:
        W, float64 on the CPU.
    """
    if lam == -math.inf:
        return torch.zeros(tuple(shape), dtype=torch.float64, device="cpu")
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
