"""Test the attribution of unCLIP's error to the prior (noise in the embedding) or the decoder."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import unclip_error as benchmark
from tiny_unclip import tiny_kandinsky

from ldm.conditioning.image_embedding import ImageEmbedding

G = torch.Generator().manual_seed(0)
TRUE = ImageEmbedding(vector=torch.randn(40, 48, generator=G), clip="x")
PROMPTS, SEEDS = ["a"] * 40, list(range(40))


def make(embedding: ImageEmbedding, prompts, seeds, worse: float = 0.0) -> torch.Tensor:
    """Decode by reshaping the embedding to an image and adding noise of standard deviation `worse`."""
    noise = torch.randn(40, 48, generator=torch.Generator().manual_seed(1))
    return (embedding.vector + worse * noise).view(-1, 3, 4, 4)


def noisy(by: float) -> ImageEmbedding:
    return replace(
        TRUE, vector=TRUE.vector + by * torch.randn(40, 48, generator=torch.Generator().manual_seed(2))
    )


def whose(prior: ImageEmbedding, worse: float) -> dict[str, float]:
    rows = benchmark.compare(
        lambda *call: make(*call, worse=worse),
        {"image": TRUE, "prior": prior, "text": noisy(2.0)},
        make(TRUE, PROMPTS, SEEDS),
        PROMPTS,
        SEEDS,
    )
    return benchmark.attribute({name: row["mse"] for name, row in rows.items()})


def test_noise_in_the_embedding_is_attributed_to_the_prior():
    clean, injected = whose(TRUE, 0.3), whose(noisy(0.5), 0.3)
    assert clean["prior"] == 0 and clean["decoder"] == pytest.approx(0.09, rel=0.1)
    assert injected["decoder"] == clean["decoder"]
    # the variance of the noise, plus its product with the decoder's error: a few hundredths for 1,920 numbers
    assert injected["prior"] == pytest.approx(0.25, abs=0.03) and injected["text"] == pytest.approx(
        4.0, rel=0.1
    )


def test_noise_in_the_output_is_attributed_to_the_decoder():
    good, bad = whose(noisy(0.5), 0.0), whose(noisy(0.5), 0.6)
    assert good["decoder"] == 0 and bad["decoder"] == pytest.approx(0.36, rel=0.1)
    assert bad["prior"] == pytest.approx(good["prior"], abs=0.05)


def test_the_rows_of_a_complete_model():
    """A prior that gives the true embedding has no error, through the same decoder and with the same seed."""
    pipe, truth = tiny_kandinsky(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    prompts, seeds = ["a cat", "a dog"], [0, 1]
    given = benchmark.embeddings(pipe, truth, prompts, seeds)
    assert list(given) == ["image", "prior", "text"]
    assert given["text"].vector.norm(dim=1) == pytest.approx(
        [float(given["image"].vector.norm(dim=1).mean())] * 2, rel=1e-4
    )
    options = SimpleNamespace(steps=2, guidance=None, batch=2)
    rows = benchmark.compare(
        benchmark.maker(pipe, options), {**given, "prior": given["image"]}, truth, prompts, seeds
    )
    assert rows["prior"]["mse"] == rows["image"]["mse"] and rows["image"]["cosine"] == pytest.approx(
        1, abs=1e-5
    )
    assert rows["text"]["cosine"] < 0.99 and rows["text"]["mse"] != rows["image"]["mse"]
