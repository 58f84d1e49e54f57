"""Test the figures of unCLIP's parts, on stand-ins with known results and once on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import unclip_quality as benchmark
from emoji_quality import real
from tiny_unclip import clip_pair, prior_stage, tiny_karlo

import ldm
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.models.unclip.autoregressive import AutoregressiveConfig
from ldm.pipelines.stages.autoregressive import AutoregressiveStage
from ldm.weights.formats.ldm_folder import write_part
from ldm.weights.parts import build_network, randomise

DEFAULTS = {
    "n": 4,
    "pictures": 2,
    "candidates": 1,
    "seed": 0,
    "invert_steps": 2,
    "iterations": 1,
    "eta": 0.25,
    "side": 32,
    "only": benchmark.NAMES,
}


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**DEFAULTS, **changes})


class Perfect:
    """A model whose prior returns the true embeddings, and whose variations are the image itself or grey."""

    def __init__(self, data, *, wrong: bool = False) -> None:
        self.clip, self.data, self.wrong = clip_pair("x"), data, wrong
        self.card = SimpleNamespace(decoder=SimpleNamespace(defaults=SimpleNamespace(height=64)))

    def imagine(self, prompts, **_) -> ImageEmbedding:
        return ImageEmbedding(vector=self.true, clip="x")

    def variations(self, image, *, n, **_) -> SimpleNamespace:
        made = image.expand(n, -1, -1, -1).clone()
        made[1 if self.wrong else 0 :] = 0.5  # all but the first are grey
        return SimpleNamespace(tensor=made if self.wrong else image.expand(n, -1, -1, -1))


def test_a_prior_with_the_true_embeddings_has_a_cosine_of_one(drawn, monkeypatch):
    model = Perfect(drawn)
    images = benchmark.real

    def remembered(chosen, data, size):
        truth = images(chosen, data, size)
        model.true = model.clip.image_embedding(truth).vector
        return truth

    monkeypatch.setattr(benchmark, "real", remembered)
    monkeypatch.setattr(
        benchmark, "draw_held_out_backgrounds", lambda data, n, rng: benchmark.held_out(data, n, rng)
    )
    rows = benchmark.prior_cosines(model, drawn, options(), np.random.default_rng(0))
    assert set(rows) == {"held-out pairs", "held-out images"}
    for row in rows.values():
        assert (
            row["prior"] == pytest.approx(1, abs=1e-5)
            and row["text"] < 0.9
            and row["gain"] == pytest.approx(1 - row["text"], abs=1e-5)
        )


def test_variations_are_counted_per_image_and_per_variation(drawn):
    same = benchmark.variations(Perfect(drawn), drawn, options(), np.random.default_rng(0))
    assert len(same) == 2 and all(
        row["one of four"] == row["each"] == 100 and row["between"] == pytest.approx(120)
        for row in same.values()
    )
    once = benchmark.variations(Perfect(drawn, wrong=True), drawn, options(), np.random.default_rng(0))
    assert all(
        row["one of four"] == 100 and row["each"] == 25 and row["between"] < 30 for row in once.values()
    )


def test_a_bicubic_upsampler_has_no_gain_and_a_perfect_one_a_large_gain(drawn):
    truth = real(benchmark.held_out(drawn, 2, np.random.default_rng(0)), drawn, 32)
    large, small = (SimpleNamespace(defaults=SimpleNamespace(height=side)) for side in (32, 16))
    card = SimpleNamespace(upsamplers=[large], decoder=small)

    class Stage:
        def __init__(self, made):
            self.made, self.settle = made, lambda prompts, **kw: None

        def __call__(self, small, call):
            return self.made(small)

    def figures(made):
        return benchmark.upsampler(
            SimpleNamespace(upsamplers=[Stage(made)], card=card), drawn, options(), np.random.default_rng(0)
        )

    same, shown = figures(lambda small: benchmark.enlarge(small, (32, 32)).clamp(0, 1))
    assert same["gain"] == pytest.approx(0, abs=1e-4) and len(shown) % 4 == 0
    perfect, shown = figures(lambda small: truth)
    assert perfect["gain"] > 20 and torch.equal(shown[2], shown[3])
    assert torch.equal(shown[0], F.interpolate(F.avg_pool2d(truth[:1], 2), (32, 32))[0])


def test_all_figures_of_a_tiny_model_and_of_a_second_prior(folder, tmp_path, capsys):
    pipe = tiny_karlo()
    pipe.card = replace(pipe.card, name="tiny-unclip", family="unclip", networks=None)
    ldm.save(pipe, tmp_path / "model")
    numbers = ["--n", "2", "--pictures", "1", "--invert-steps", "2", "--iterations", "1", "--side", "32"]
    files = ["--json", str(tmp_path / "q.json"), "--picture", str(tmp_path / "up.png")]
    benchmark.draw_held_out_backgrounds, before = (
        (lambda data, n, rng: benchmark.held_out(data, n, rng)),
        benchmark.draw_held_out_backgrounds,
    )
    try:
        benchmark.main(["--weights", str(tmp_path / "model"), "--data", str(folder), *numbers, *files])
        config = AutoregressiveConfig(
            embed_dim=24,
            text_dim=24,
            width=16,
            layers=1,
            heads=2,
            head_dim=8,
            components=4,
            buckets=8,
            similarities=4,
        )
        write_part(tmp_path / "ar", "prior", randomise(build_network(config)), config, clip=pipe.card.clip)
        benchmark.main(
            [
                "--weights",
                str(tmp_path / "model"),
                "--data",
                str(folder),
                "--only",
                "prior",
                "--prior",
                str(tmp_path / "ar"),
                *numbers,
            ]
        )
    finally:
        benchmark.draw_held_out_backgrounds = before
    out = capsys.readouterr().out
    assert (
        "| variations from embedding alone: one of four" in out
        and "| at most 3 dB lost |" in out
        and "| upsampler: PSNR |" in out
    )
    figures = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    # a pixel decoder has no autoencoder: only float32 rounding is lost
    assert figures["reconstruction"]["autoencoder"] > 60
    assert (tmp_path / "up.png").is_file()
    write_part(
        tmp_path / "strange",
        "prior",
        prior_stage(pipe.card).net,
        prior_stage(pipe.card).net.config,
        clip="another",
    )
    with pytest.raises(ValueError, match="trained on 'another'"):
        benchmark.other_prior(pipe, tmp_path / "strange")
    benchmark.other_prior(pipe, tmp_path / "ar")
    assert isinstance(pipe.prior, AutoregressiveStage)
