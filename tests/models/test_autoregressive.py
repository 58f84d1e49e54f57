"""The autoregressive prior and its codes: closed forms, causality, sampling."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.cond import Cond
from ldm.models.unclip.autoregressive import AutoregressiveConfig, AutoregressivePrior, gumbel
from ldm.models.unclip.embedding_codes import EmbeddingCodes, truncate

CONFIG = AutoregressiveConfig(
    embed_dim=12,
    text_dim=10,
    length=5,
    width=16,
    layers=2,
    heads=2,
    head_dim=8,
    components=4,
    buckets=32,
    similarities=8,
)


def low_rank(n: int = 400) -> torch.Tensor:
    """Return embeddings that vary in four directions with known variances, around a mean."""
    g = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 4, generator=g))[0]
    return torch.randn(n, 4, generator=g) * torch.tensor([4.0, 2.0, 1.0, 0.5]) @ directions.T + torch.arange(
        12.0
    )


def condition(n: int = 2) -> Cond:
    g = torch.Generator().manual_seed(4)
    mask = torch.arange(5) < torch.tensor([[5], [2]]).repeat(n // 2, 1)
    return Cond(
        context=torch.randn(n, 5, 10, generator=g), context_mask=mask, pooled=torch.randn(n, 12, generator=g)
    )


def test_the_components_are_those_of_the_largest_variance_and_keep_it():
    codes, e = EmbeddingCodes(12, 4, 1024), low_rank()
    assert codes.fit(e) == pytest.approx(1.0, abs=1e-6)
    variance = codes.project(e).var(0)
    assert (variance.diff() < 0).all() and torch.allclose(
        variance, torch.tensor([16.0, 4, 1, 0.25]), rtol=0.3
    )  # 400 samples
    assert torch.allclose(codes.basis @ codes.basis.T, torch.eye(4), atol=1e-5)
    # a range r in 1024 buckets: at most r/2048 from the center; values outside the range are excluded
    inside = ((codes.project(e) > codes.low) & (codes.project(e) < codes.high)).all(1)
    width = (codes.high - codes.low).square().sum().sqrt() / 2048
    assert (codes.decode(codes.encode(e)) - e)[inside].norm(dim=1).max() <= width * 1.001


def test_truncation_keeps_only_the_first_components():
    codes, e = EmbeddingCodes(12, 4, 8), low_rank()
    codes.fit(e)
    errors = [(truncate(e, k, codes) - e).square().sum(1).mean() for k in range(5)]
    assert torch.allclose(truncate(e, 0, codes), e.mean(0).expand_as(e), atol=1e-4) and errors[4] < 1e-8
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
    with pytest.raises(ValueError, match="components: expected 0 to 4, got 5"):
        truncate(e, 5, codes)


def test_each_component_is_predicted_from_those_before_it():
    torch.manual_seed(0)
    net, cond = AutoregressivePrior(CONFIG).eval(), condition()
    codes, level = torch.randint(0, 32, (2, 3)), torch.tensor([1, 6])
    logits = net(codes, level, cond)
    assert logits.shape == (2, 4, 32)
    changed = codes.clone()
    changed[:, 1] = (changed[:, 1] + 7) % 32
    other = net(changed, level, cond)
    assert torch.allclose(logits[:, :2], other[:, :2], atol=1e-6) and not torch.allclose(
        logits[:, 2:], other[:, 2:], atol=1e-3
    )
    assert not torch.allclose(net(codes, level.flip(0), cond)[:, 0], logits[:, 0], atol=1e-4)


def test_gumbel_draws_have_the_frequencies_of_the_softmax():
    logits = torch.tensor([0.5, 2.0, -1.0, 0.0])
    draws = torch.stack([logits + gumbel(7, k, 4) for k in range(4000)]).argmax(1)
    frequency = torch.bincount(draws, minlength=4) / 4000
    assert torch.allclose(frequency, logits.softmax(0), atol=0.03)  # four standard deviations of 4000 samples


def test_a_sample_depends_only_on_its_seed_and_training_fits_the_data():
    torch.manual_seed(0)
    net, cond = AutoregressivePrior(CONFIG), condition()
    net.codes.fit(low_rank())
    both, alone = net.eval().sample(cond, [3, 4]), net.sample(cond[1:2], [4])
    assert both.shape == (2, 12) and torch.allclose(both[1], alone[0], atol=1e-5)
    assert not torch.equal(both, net.sample(cond, [5, 6]))
    images = low_rank(2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        loss = net.loss(images, cond).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # nats; it starts at log 32 = 3.5
    made = net.eval().sample(cond, [0, 1], temperature=0, similarity=-0.5)
    buckets = ((net.codes.high - net.codes.low) / 32).square().sum().sqrt()
    assert (made - images).norm(
        dim=1
    ).max() < buckets  # each caption gives its own image embedding, up to the buckets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": 1.5}, "similarity: expected a cosine"),
        ({"temperature": -1.0}, "temperature"),
        ({"seeds": [0]}, "1 seeds for a condition of batch"),
    ],
)
def test_invalid_arguments_are_named(options, message):
    net = AutoregressivePrior(CONFIG)
    with pytest.raises(ValueError, match=message):
        net.sample(condition(), **{"seeds": [0, 1], **options})
    with pytest.raises(ValueError, match="components: expected at most embed_dim 12"):
        AutoregressiveConfig(embed_dim=12, components=13)
