"""Training of unCLIP's networks: early errors, exact resumption, complete exports, and their inputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainings import (
    CONDITION,
    PRIOR,
    UNET,
    configs,
    run,
    unclip_configs,
    write,
)

from ldm.models.unclip.decoder import Decoder, DecoderConfig
from ldm.models.unclip.prior import Prior, PriorConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.training.caches.embeddings import EmbeddingCache, embed
from ldm.training.degradation import Degradation, blur, round_blocks
from ldm.training.draws import Draws
from ldm.training.parts.prior import PriorPart
from ldm.training.run import open_run, read_training_config
from ldm.weights.formats.ldm_folder import about_part, read_part, read_text, write_part

DIT = {"in_channels": 4, "out_channels": 4, "width": 16, "depth": 1, "head_dim": 8, "context_dim": 16}


@pytest.fixture(scope="module")
def exports(shared_folder, tmp_path_factory):
    """Train and export the networks that the others begin with; return the folder of their runs."""
    where, made = tmp_path_factory.mktemp("exports"), configs(shared_folder)
    made["unet"]["text"] = {"folder": "runs/draft/export"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for name in ("vae", "clip", "draft", "unet"):
            begun = open_run(write(made[name], Path(f"{name}.yaml")))
            begun.train(progress=False, until=2)
            begun.export(Path(f"runs/{name}/export"))
    return where


@pytest.fixture
def place(shared_folder, exports, tmp_path, monkeypatch):
    """Change to a folder with copies of the exports; return the folder of the data set."""
    shutil.copytree(exports, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return shared_folder


def weights(name: str) -> dict[str, torch.Tensor]:
    state = torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)
    return {**state["model"], **{f"ema.{key}": value for key, value in state["ema"].items()}}


def test_every_network_trains_resumes_exactly_and_is_exported(place):
    for name, config in unclip_configs(place).items():
        path = write(config, Path(f"{name}.yaml"))
        whole = open_run(path)
        whole.train(progress=False)
        halves = write({**config, "run": {**config["run"], "name": "halves-" + name}}, Path("halves.yaml"))
        open_run(halves).train(progress=False, until=3)
        open_run(halves).train(progress=False)
        expected, got = weights(name), weights("halves-" + name)
        assert expected.keys() == got.keys() and all(
            torch.equal(expected[key], got[key]) for key in expected
        ), name
        whole.export(Path(f"runs/{name}/export"))
    assert (
        about_part("runs/prior/export", "prior")["clip"]
        == about_part("runs/decoder/export", "decoder")["clip"]
    )
    net, about = read_part("runs/prior/export", "prior", PriorConfig, Prior)
    assert float((net.clip_std - 1).abs().max()) > 1e-3  # measured, not the initial ones
    assert about["network"] == "Prior" and {"cosine", "text_cosine"} <= about["figures"].keys()
    began, learned = (
        read_part(f"runs/{name}/export", "decoder", DecoderConfig, Decoder)[0].state_dict()
        for name in ("decoder", "decoder-begun")
    )
    # six steps at a learning rate of 1e-3 move a weight by 0.006 at most
    assert max(float((learned[key] - value).abs().max()) for key, value in began.items()) < 0.007
    assert not torch.equal(learned["unet.conv_in.weight"], began["unet.conv_in.weight"])
    assert (
        about_part("runs/clip-text/export", "text")["clip"]
        == about_part("runs/decoder-begun/export", "decoder")["clip"]
    )
    assert read_text("runs/clip-text/export").draft is None
    assert about_part("runs/prior-ar/export", "prior")["network"] == "AutoregressivePrior"
    assert {"psnr", "bicubic_psnr"} <= about_part("runs/upsampler/export", "upsampler")["figures"].keys()
    assert Path("runs/upsampler/samples/0000004.png").is_file()


def test_every_network_takes_a_step_in_bfloat16(place):
    for name, config in unclip_configs(place).items():
        made = open_run(
            write(
                {**config, "run": {**config["run"], "precision": "bfloat16", "steps": 1}},
                Path(f"{name}.yaml"),
            )
        )
        made.train(progress=False)
        if name != "upsampler":
            made.export(Path(f"runs/{name}/export"))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in made.part.model.parameters()), (
            name
        )


def test_a_prior_learns_the_embeddings_of_its_captions(place):
    """After 240 steps on six shapes it explains more than 40 % of the embeddings' variance."""
    config = unclip_configs(place)["prior"]
    model = {**PRIOR, "width": 32, "layers": 2, "heads": 4}
    settings = run(
        "long",
        steps=240,
        batch=16,
        ema=0.5,
        validate_every=240,
        sample_every=240,
        checkpoint_every=240,
    )
    settings["optimizer"] = {"lr": 3e-3, "warmup": 5, "decay": 80}
    made = open_run(write({**config, "run": settings, "model": model}, Path("long.yaml")))
    assert isinstance(made.part, PriorPart)
    made.train(progress=False)
    losses = [
        row["loss"]
        for row in map(json.loads, Path("runs/long/metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "loss" in row
    ]
    # x0 has unit variance: predicting the mean embedding has a loss of 1, and a random network one above it
    assert np.mean(losses[-40:]) < 0.6 < 1 < losses[0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prior", {"autoregressive": {**PRIOR, "components": 4}}, "one of model"),
        ("prior", {"diffusion": {"prediction": "eps"}}, "a prior predicts x0, got 'eps'"),
        ("decoder", {"drop_image": 1.5}, "drop_image"),
        (
            "decoder",
            {"model": {"unet": {**UNET, "out_channels": 8}, "condition": CONDITION}},
            "a learned variance is not supported",
        ),
        ("decoder", {"model": {"condition": CONDITION}}, "expected one of unet and dit"),
        ("decoder", {"model": {"dit": DIT, "condition": CONDITION}}, "dit: it takes no vector"),
        (
            "decoder",
            {"model": {"dit": DIT, "condition": {**CONDITION, "pooled_dim": None, "norms": []}}},
            "model.unet: expected a UNet",
        ),
        (
            "decoder-from-prior",
            {"from_prior": {"prior": "runs/prior/export", "share": 0.0}},
            "share: expected more than 0",
        ),
        (
            "decoder-from-prior",
            {"from_prior": {"prior": "runs/prior/export", "steps": 0}},
            "steps: expected at least 1",
        ),
        ("upsampler", {"residual": 0.0}, "residual: expected a positive number or None, got 0.0"),
        ("upsampler", {"crop": 13}, "crop 13: expected a multiple of 2"),
        ("upsampler", {"degradation": {"share": 2.0}}, "share: expected at most 1"),
    ],
)
def test_configurations_that_cannot_work_are_refused_before_any_work(folder, tmp_path, name, change, message):
    path = write({**unclip_configs(folder)[name], **change}, tmp_path / "wrong.yaml")
    with pytest.raises(ValueError, match=message):
        read_training_config(path)


def test_weights_of_another_shape_are_refused(place):
    made = unclip_configs(place)
    with pytest.raises(
        ValueError,
        match="the unet in 'runs/unet/export' has another shape, first at 'conv_in.weight': expected",
    ):
        open_run(write({**made["decoder"], "net": "runs/unet/export"}, Path("narrow.yaml")))


def test_cached_embeddings_are_those_of_the_images(place):
    """Float16 has eleven significant bits, an error of less than a thousandth of the largest."""
    part = open_run(write(unclip_configs(place)["prior"], Path("prior.yaml"))).part
    rows = [0, 7, len(part.embeddings.vectors) - 1]
    expected = embed(part.clip, part.images, [part.scenes.rows[row] for row in rows])
    assert torch.allclose(part.embeddings[rows], expected, atol=1e-3 * float(expected.abs().max()))


def test_a_second_prior_begins_with_the_first_ones_weights(place):
    made = unclip_configs(place)["prior"]
    train = open_run(write(made, Path("prior.yaml")))
    train.train(progress=False)
    train.export(Path("runs/prior/export"))
    first, _ = read_part("runs/prior/export", "prior", PriorConfig, Prior)
    again = open_run(
        write(
            {**made, "run": {**made["run"], "name": "prior-2"}, "net": "runs/prior/export"},
            Path("prior-2.yaml"),
        )
    ).part.net
    assert all(torch.equal(again.state_dict()[key], value) for key, value in first.state_dict().items())


def test_a_prior_of_another_width_is_refused(place):
    config = unclip_configs(place)["prior"]
    with pytest.raises(ValueError, match="embed_dim 12: the embeddings of 'emoji-clip/"):
        open_run(write({**config, "model": {**PRIOR, "embed_dim": 12}}, Path("narrow.yaml")))


def test_blur_of_an_impulse_is_the_gaussian():
    x = torch.zeros(2, 1, 31, 31)
    x[:, :, 15, 15] = 1
    y = blur(x, torch.tensor([1.5, 0.0]), 1.5)
    line = torch.exp(-(torch.arange(31.0) - 15).square() / 4.5)
    line[(torch.arange(31) - 15).abs() > 5] = 0  # cut at three standard deviations
    line = line / line.sum()
    assert torch.allclose(y[0, 0], line[:, None] * line, atol=1e-6) and torch.allclose(y[1], x[1], atol=1e-6)


def test_rounded_blocks_differ_by_half_a_step_at_most():
    x = torch.rand(2, 3, 19, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = round_blocks(x, torch.tensor([0.0, 0.2]).view(2, 1, 1, 1))
    assert torch.equal(y[0], round_blocks(x, torch.zeros(2, 1, 1, 1))[0]) and torch.allclose(
        y[0], x[0], atol=1e-5
    )
    error = (y[1] - x[1]).square().mean().sqrt()
    assert (
        0.5 * 0.2 / 12**0.5 < error < 1.5 * 0.2 / 12**0.5
    )  # an orthonormal transform keeps the RMS of rounding, step/√12
    flat = torch.full((1, 3, 16, 16), 0.4)
    assert torch.allclose(
        round_blocks(flat, torch.full((1, 1, 1, 1), 0.1)), flat, atol=0.1 / 16 + 1e-5
    )  # one coefficient: 8 times the value


def test_degradation_depends_on_the_generator_and_stays_in_range():
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    worse = Degradation(blur=1.0, noise=0.3, blocks=0.3)
    a, b, c = (worse(x, Draws(seed, range(4))) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and float(a.abs().max()) <= 1
    halves = [worse(x[part], Draws(1, range(4)[part])) for part in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(a, torch.cat(halves), atol=1e-6)  # each image by its own sample
    none = replace(worse, blur=0.0, noise=0.0, blocks=0.0)
    assert torch.equal(none(x, Draws(1, range(4))), x)


def test_the_share_of_embeddings_from_the_prior() -> None:
    own, made = np.zeros((8, 4), np.float16), np.ones((8, 4), np.float16)
    cache = EmbeddingCache(vectors=own, from_prior=made, share=0.25)
    drawn = cache.draw([0, 7] * 2000, Draws(0, range(4000)))
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and bool(
        (drawn == drawn[:, :1]).all()
    )  # no embedding is mixed
    assert abs(float(drawn.mean()) - 0.25) < 0.03  # 4.4 standard errors of 4,000 draws
    assert bool((cache[[3, 4]] == 0).all())  # rows alone give the images' own embeddings


def test_a_decoder_begins_with_a_unet(place) -> None:
    shape = UNetConfig(**{**UNET, "embedded": False, "pooled_dim": 16, "channels": (8, 16), "depth": (0, 1)})
    unet = UNet(shape)
    write_part(Path("runs/plain/export"), "unet", unet, shape, dtype=None)
    config = {**unclip_configs(place)["decoder"], "net": "runs/plain/export"}
    decoder = open_run(write(config, Path("begun.yaml"))).part.net
    own = decoder.unet.state_dict()
    shared = {
        name: value for name, value in unet.state_dict().items() if not name.startswith("add_embedding")
    }
    assert own.keys() == shared.keys() and all(torch.equal(own[name], shared[name]) for name in shared)


def test_a_prior_of_another_clip_is_refused(place) -> None:
    config = unclip_configs(place)["prior"]
    made = open_run(write(config, Path("prior.yaml")))
    made.train(progress=False, until=1)
    made.export(Path("runs/prior/export"))
    other = replace_clip(Path("runs/prior/export/prior.yaml"))
    config_from_prior = {**unclip_configs(place)["decoder-from-prior"], "net": None}
    with pytest.raises(ValueError, match=f"embeddings of {other!r}, expected 'emoji-clip/"):
        open_run(write(config_from_prior, Path("from-prior.yaml")))


def replace_clip(about: Path, name: str = "emoji-clip/0123") -> str:
    """Replace the name of the CLIP in a prior's YAML."""
    lines = about.read_text(encoding="utf-8").splitlines()
    about.write_text(
        "".join(f"clip: {name}\n" if line.startswith("clip: ") else f"{line}\n" for line in lines),
        encoding="utf-8",
    )
    return name
