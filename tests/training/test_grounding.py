"""Attention that learns to lie where things are: its loss by the equation, what it looks at, and that nothing
else learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainings import configs, run, write

from ldm.data import Composition
from ldm.data.captions import caption_pieces, join_captions
from ldm.training.grounding import Grounding, Named, attended, grounding_loss, named
from ldm.training.loop import Draws
from ldm.training.run import open_run, read_training_config
from ldm.weights.formats.safetensors import read_safetensors

QUARTER = torch.zeros(4, 4)
QUARTER[:2, :2] = 1


def maps(of: torch.Tensor, tokens: int = 3) -> torch.Tensor:
    """Probabilities (1, L, M) that give token 1 a tenth of an area (h, w), token 2 twice that, token 0 what
    is left."""
    p = torch.zeros(1, of.numel(), tokens)
    p[0, :, 1], p[0, :, 2] = of.flatten() / 10, of.flatten() / 5
    p[..., 0] = 1 - p[..., 1:].sum(-1)
    return p


def test_the_loss_is_the_divergence_of_attention_from_the_area() -> None:
    own = [Named(0, [1, 2], QUARTER)]
    assert float(grounding_loss([maps(QUARTER)], own)) < 1e-6  # the same shape, whatever its height
    everywhere = torch.ones(4, 4)
    assert (
        abs(float(grounding_loss([maps(everywhere)], own)) - math.log(4)) < 1e-5
    )  # KL(uniform on 4 ‖ uniform on 16)
    half = QUARTER + QUARTER.flip(1)
    assert (
        abs(float(grounding_loss([maps(half), maps(everywhere)], own)) - (math.log(2) + math.log(4)) / 2)
        < 1e-5
    )
    assert (
        abs(float(grounding_loss([maps(torch.ones(2, 2))], own)) - math.log(4)) < 1e-5
    )  # the area at the map's own size
    assert float(grounding_loss([maps(QUARTER)], [])) == 0


def test_names_are_found_with_their_tokens_and_areas(place) -> None:
    part = open_run(write(place["ldm"], Path("ldm.yaml"))).part
    index, text = part.pictures.data.index, part.text
    names = [i for i in range(len(index)) if len(index[i].phrase.split()) > 1 and index[i].style == "noto"][
        :2
    ]
    both = Composition(image=names[0], second=names[1], background="blue")
    said = [[], caption_pieces(both, index, np.random.default_rng(1))]
    found = named(said, [both, both], part.pictures.data.images, text, 32)
    assert [one.sample for one in found] == [1, 1, 1]
    there = {place: word for word, places in text.places(join_captions(said)[1]) for place in places}
    heard = [" ".join(dict.fromkeys(there[place] for place in one.places)) for one in found]
    wanted = [piece for piece, area in said[1] if area is not None]
    assert heard == wanted
    first, second, ground = (one.area for one in found)
    assert (
        first[:, 16:].sum() == 0 < first.sum()
        and second[:, :16].sum() == 0 < second.sum()
        and ground.mean() > 0.4
    )


def test_queries_and_keys_alone_learn(place) -> None:
    config = place["ldm"]
    grounded = {
        **config,
        "net": "runs/ldm/export",
        "text": {"folder": "runs/ldm/export"},
        "grounding": {"weight": 1.0, "only": True},
        "run": run("grounded"),
    }
    training = open_run(write(grounded, Path("grounded.yaml")))
    net = training.part.denoiser.net
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning and all("attn2.to_q" in name or "attn2.to_k" in name for name in learning)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    training.train(progress=False)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == (name not in learning), name
    rows = [json.loads(line) for line in Path("runs/grounded/metrics.jsonl").read_text().splitlines()]
    assert all("grounding" in row for row in rows if "loss" in row) and any(
        "validation/pairs_grounding" in row for row in rows
    )
    training.export(Path("runs/grounded/export"))
    given, got = (read_safetensors(f"runs/{name}/export/unet.safetensors") for name in ("ldm", "grounded"))
    assert {name for name in given if not torch.equal(given[name], got[name])} == learning


def test_attention_comes_nearer_to_what_words_name(place) -> None:
    """One batch again and again, all weights learning: a few steps of training leave a network that cannot
    tell positions apart."""
    part = open_run(
        write({**place["ldm"], "run": run("all"), "grounding": {"weight": 1.0}}, Path("all.yaml"))
    ).part
    optimizer = torch.optim.Adam(part.denoiser.net.parameters(), lr=1e-2)
    far = []
    for _ in range(60):
        loss, figures = part.loss(Draws(0, 0), 4)
        far.append(float(figures["grounding"].detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert far[-1] < 0.5 * far[0], far


def test_looking_at_attention_changes_nothing(place) -> None:
    part = open_run(write(place["ldm"], Path("ldm.yaml"))).part
    x, t, cond = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([3, 700]),
        part.text(["a kitty", "ring on a blue background"]),
    )
    plain = part.denoiser.predict(x, t, cond)
    with attended(part.denoiser.net) as seen:
        assert torch.equal(part.denoiser.predict(x, t, cond), plain)
    assert seen and all(torch.allclose(p.sum(-1), torch.ones(2, p.shape[1])) for p in seen.values())


def test_what_cannot_be_learnt_so_is_refused(place) -> None:
    with pytest.raises(ValueError, match="weight"):
        Grounding(weight=-1)
    for changes in (
        {"text": {"folder": "runs/ldm/export"}},
        {"net": "runs/ldm/export"},
    ):  # no net; a text that is tuned
        with pytest.raises(ValueError, match="grounding.only: expected a net"):
            read_training_config(
                write(
                    {**place["ldm"], **changes, "grounding": {"weight": 1.0, "only": True}},
                    Path("wrong.yaml"),
                )
            )


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """Configurations, in a folder to run in where a small model has been trained a few steps."""
    monkeypatch.chdir(tmp_path)
    made = configs(folder)
    for name in ("vae", "clip", "draft", "ldm"):
        training = open_run(write(made[name], Path(f"{name}.yaml")))
        training.train(progress=False)
        training.export(Path(f"runs/{name}/export"))
    return made
