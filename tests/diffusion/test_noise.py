"""Noise depends on the seed and the step only; Brownian paths are shared by grids of different length."""

import math

import pytest
import torch

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.noise import brownian, brownian_noise, initial_noise, keyed_noise, keyed_normal
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()


def test_initial_noise_equals_torch_randn() -> None:
    noise = initial_noise([7, 8], (4, 8, 8))
    for i, seed in enumerate((7, 8)):
        assert torch.equal(
            noise[i : i + 1], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        )


def test_step_noise_depends_on_seed_and_step_only() -> None:
    like = torch.empty(7, 3, 5)
    batch = keyed_noise(range(7))(4, like)
    for i in range(7):
        assert torch.equal(batch[i : i + 1], keyed_noise([i])(4, like[:1]))
    assert torch.equal(batch.flip(0), keyed_noise(range(6, -1, -1))(4, like))
    later = keyed_noise(range(7))
    later(9, like)  # the order of the draws does not matter
    assert torch.equal(later(4, like), batch)


def test_streams_are_normal_and_uncorrelated() -> None:
    """Neighbouring keys, and seeds that agree in their low 32 bits: correlations of 100,000 draws stay within
    5 standard errors."""
    n = 100_000
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (2**32 + 1, 1), (2**64 - 1, 3)]
    draws = torch.stack(
        [keyed_normal(seed, k, (n,)) for seed, k in keys] + [initial_noise([0], (n,))[0]]
    ).double()
    assert float(draws.mean(1).abs().max()) < 5 / n**0.5
    gram = draws @ draws.T / n
    assert float((gram - torch.eye(len(draws))).abs().max()) < 5 * (2 / n) ** 0.5


def test_dtype_is_cast_after_drawing() -> None:
    like = torch.empty(1, 8)
    full = keyed_noise([3])(0, like)
    assert torch.equal(keyed_noise([3])(0, like.bfloat16()), full.bfloat16())
    assert torch.equal(initial_noise([3], (8,), dtype=torch.bfloat16), initial_noise([3], (8,)).bfloat16())


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="seeds"):
        keyed_noise([])
    with pytest.raises(ValueError, match="seeds"):
        initial_noise([-1], (2,))
    with pytest.raises(ValueError, match="batch of 2"):
        keyed_noise([0])(0, torch.empty(2, 3))


def test_brownian_path() -> None:
    """W has the covariance of Brownian motion, over 20,000 values of one seed.

    Var(W(b) − W(a)) = b − a, and disjoint increments are uncorrelated.
    """
    n = 20_000
    lams = [-math.inf, -2.0, -0.5, 0.1, 2.5]
    times = [0.0, *(math.exp(2 * lam) for lam in lams[1:])]
    path = [brownian(7, lam, (n,)) for lam in lams]
    steps = torch.stack(
        [
            (b - a) / math.sqrt(v - u)
            for a, b, u, v in zip(path[:-1], path[1:], times[:-1], times[1:], strict=True)
        ]
    )
    gram = steps @ steps.T / n
    assert float((gram - torch.eye(4, dtype=torch.float64)).abs().max()) < 4 * math.sqrt(2 / n)
    assert torch.equal(brownian(7, 0.1, (n,)), path[3]) and not torch.equal(brownian(8, 0.1, (n,)), path[3])


def test_brownian_noise_does_not_depend_on_the_batch() -> None:
    grid, seeds, like = (
        TimeGrid.make(SCHEDULE, 6, spacing="karras"),
        list(range(7)),
        torch.empty(7, 3, dtype=torch.float64),
    )
    batch = brownian_noise(seeds, grid)(3, like)
    assert torch.equal(brownian_noise(seeds[::-1], grid)(3, like).flip(0), batch)
    for i in seeds:
        assert torch.equal(brownian_noise([i], grid)(3, like[:1]), batch[i : i + 1])


def test_brownian_noise_is_refused_where_no_noise_is_added() -> None:
    grid = TimeGrid.make(SCHEDULE, 3)
    with pytest.raises(ValueError, match="clean data"):
        brownian_noise([0], grid)(2, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="batch of 2"):
        brownian_noise([0], grid)(0, torch.zeros(2, 2))
