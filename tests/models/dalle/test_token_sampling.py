"""The choice of tokens: exact probabilities, against min-dalle's formula, and draws that belong to seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.models.dalle.sampling import draw_tokens, kept_logits, super_conditioned

LOGITS = 2 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))


def peer_probabilities(uncond: Tensor, cond: Tensor, factor: float, temperature: float, top_k: int) -> Tensor:
    """Return min-dalle's: subtract the maximum, exponentiate, zero what is below the k-th."""
    logits = uncond * (1 - factor) + cond * factor
    ordered, _ = logits.sort(descending=True)
    kept = logits >= ordered[:, top_k - 1 : top_k]
    weights = ((logits - ordered[:, :1]) / temperature).exp() * kept
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("factor", "temperature", "top_k"), [(16, 1, 10), (10, 0.5, 50), (1, 2, 1), (0, 1, 7)]
)
def test_probabilities_equal_min_dalle(factor: float, temperature: float, top_k: int) -> None:
    cond = LOGITS.roll(1, 0)
    ours = kept_logits(
        super_conditioned(LOGITS, cond, factor), temperature=temperature, top_k=top_k, top_p=1.0
    )
    theirs = peer_probabilities(LOGITS.double(), cond.double(), factor, temperature, top_k)
    assert torch.allclose(ours.softmax(1).double(), theirs, atol=1e-5)
    assert torch.equal(ours.isfinite().sum(1), torch.full((3,), top_k))


def test_the_nucleus_is_the_smallest_that_suffices() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()

    def kept(top_p: float, **options: int) -> list[bool]:
        found = kept_logits(logits, temperature=1.0, top_k=options.get("top_k", 4), top_p=top_p)
        return found.isfinite()[0].tolist()

    assert kept(0.4) == kept(0.5) == [True, False, False, False]
    assert kept(0.51) == [True, True, False, False]
    assert kept(0.85) == [True, True, True, False]  # of two equal ones, the first
    assert kept(1.0) == [True] * 4
    assert kept(0.6, top_k=2) == [True, False, False, False]  # 0.5 of 0.8 together


def test_equal_logits_are_all_kept() -> None:
    assert kept_logits(torch.zeros(1, 5), temperature=1.0, top_k=2, top_p=1.0).isfinite().all()


def test_draws_have_the_probabilities() -> None:
    logits, count = LOGITS[:1], 4000
    options = {"temperature": 0.8, "top_k": 6, "top_p": 0.95}
    p = kept_logits(logits, **options).softmax(1)[0].double()
    drawn = draw_tokens(logits.expand(count, -1), range(count), 3, **options)
    seen, expected = torch.bincount(drawn, minlength=50).double(), p * count
    assert not seen[expected == 0].any()
    kept = expected > 0
    chi2 = ((seen - expected)[kept].square() / expected[kept]).sum()
    assert chi2 < 25.0  # of at most 5 degrees of freedom: probability 1e-4


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    flat = torch.zeros(4, 1000)
    drawn = draw_tokens(flat, [5, 6, 7, 8], 2, top_k=1000)
    assert len(set(drawn.tolist())) == 4
    assert int(draw_tokens(flat[:1], [7], 2, top_k=1000)) == int(drawn[2])
    assert int(draw_tokens(flat[:1], [7], 3, top_k=1000)) != int(drawn[2])


def test_temperature_zero_takes_the_most_probable() -> None:
    assert torch.equal(draw_tokens(LOGITS, [0, 1, 2], 0, temperature=0.0), LOGITS.argmax(1))
    assert torch.equal(draw_tokens(LOGITS, [0, 1, 2], 0, top_k=1), LOGITS.argmax(1))
