import pytest
import torch

from ldm.diffusion.noise import initial_noise, keyed_noise, keyed_normal


def test_initial_noise_is_torch_s_own() -> None:
    noise = initial_noise([7, 8], (4, 8, 8))
    for i, seed in enumerate((7, 8)):
        assert torch.equal(
            noise[i : i + 1], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        )


def test_step_noise_depends_on_seed_and_step_alone() -> None:
    like = torch.empty(7, 3, 5)
    batch = keyed_noise(range(7))(4, like)
    for i in range(7):
        assert torch.equal(batch[i : i + 1], keyed_noise([i])(4, like[:1]))
    assert torch.equal(batch.flip(0), keyed_noise(range(6, -1, -1))(4, like))
    later = keyed_noise(range(7))
    later(9, like)  # the order of the draws does not matter either
    assert torch.equal(later(4, like), batch)


def test_streams_are_normal_and_unrelated() -> None:
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
