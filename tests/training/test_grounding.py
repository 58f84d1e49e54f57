"""Grounding of attention: its loss against closed forms, the named areas, and the weights that it trains."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainings import configs, run, write

from ldm.data import side_by_side
from ldm.data.captions import caption_pieces, join_captions
from ldm.training.draws import Draws
from ldm.training.losses.grounding import (
    Grounding,
    NamedArea,
    find_named_areas,
    grounding_losses,
    record_attention,
)
from ldm.training.run import open_run, read_training_config
from ldm.weights.formats.safetensors import read_safetensors

QUARTER = torch.zeros(4, 4)
QUARTER[:2, :2] = 1


def maps(of: torch.Tensor, tokens: int = 3) -> torch.Tensor:
    """Return probabilities (1, L, M): a tenth of an area for token 1, a fifth for 2, the rest for 0."""
    p = torch.zeros(1, of.numel(), tokens)
    p[0, :, 1], p[0, :, 2] = of.flatten() / 10, of.flatten() / 5
    p[..., 0] = 1 - p[..., 1:].sum(-1)
    return p


def test_the_loss_is_the_divergence_of_attention_from_the_area() -> None:
    named = [NamedArea(sample=0, tokens=[1, 2], area=QUARTER)]
    assert float(grounding_losses([maps(QUARTER)], named).mean()) < 1e-6  # the same shape at another scale
    everywhere = torch.ones(4, 4)
    assert (
        abs(float(grounding_losses([maps(everywhere)], named).mean()) - math.log(4)) < 1e-5
    )  # KL(uniform on 4 ‖ uniform on 16)
    half = QUARTER + QUARTER.flip(1)
    assert (
        abs(
            float(grounding_losses([maps(half), maps(everywhere)], named).mean())
            - (math.log(2) + math.log(4)) / 2
        )
        < 1e-5
    )
    assert (
        abs(float(grounding_losses([maps(torch.ones(2, 2))], named).mean()) - math.log(4)) < 1e-5
    )  # the area is reduced to the map's size
    assert grounding_losses([maps(QUARTER)], []).shape == (0,)


def test_named_things_have_their_tokens_and_areas(place) -> None:
    part = open_run(write(place["unet"], Path("unet.yaml"))).part
    index, text = part.images.index, part.text
    names = [i for i in range(len(index)) if len(index[i].phrase.split()) > 1 and index[i].style == "noto"][
        :2
    ]
    both = side_by_side(index, names[0], names[1], "blue")
    captions = [[], caption_pieces(both.facts, index, np.random.default_rng(1))]
    found = find_named_areas(captions, [both, both], part.images.data.images, text, 32)
    assert [one.sample for one in found] == [1, 1, 1]
    there = {place: word for word, places in text.places(join_captions(captions)[1]) for place in places}
    found_words = [" ".join(dict.fromkeys(there[place] for place in one.tokens)) for one in found]
    wanted = [
        "".join(piece.text for piece in captions[1] if piece.area == area).strip()
        for area in ("first", "second", "background")
    ]
    assert found_words == wanted
    first, second, background = (one.area for one in found)
    assert (
        first[:, 16:].sum() == 0 < first.sum()
        and second[:, :16].sum() == 0 < second.sum()
        and background.mean() > 0.4
    )


def test_only_queries_and_keys_are_trained(place) -> None:
    config = place["unet"]
    grounded = {
        **config,
        "net": "runs/unet/export",
        "text": {"folder": "runs/unet/export"},
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
    rows = [
        json.loads(line)
        for line in Path("runs/grounded/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert all("grounding" in row for row in rows if "loss" in row) and any(
        "validation/pairs_grounding" in row for row in rows
    )
    training.export(Path("runs/grounded/export"))
    given, got = (read_safetensors(f"runs/{name}/export/unet.safetensors") for name in ("unet", "grounded"))
    assert {name for name in given if not torch.equal(given[name], got[name])} == learning


def test_attention_approaches_the_named_areas(place) -> None:
    """Train all weights on one batch, because the network has had too few steps to distinguish positions."""
    part = open_run(
        write({**place["unet"], "run": run("all"), "grounding": {"weight": 1.0}}, Path("all.yaml"))
    ).part
    optimizer = torch.optim.Adam(part.denoiser.net.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, figures = part.loss(Draws(0, range(4)))
        losses.append(float(figures["grounding"].detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0], losses


def test_recording_attention_changes_no_output(place) -> None:
    part = open_run(write(place["unet"], Path("unet.yaml"))).part
    x, t, cond = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([3, 700]),
        part.text(["a kitty", "ring on a blue background"]),
    )
    plain = part.denoiser.predict(x, t, cond)
    with record_attention(part.denoiser.net) as recorded:
        assert torch.equal(part.denoiser.predict(x, t, cond), plain)
    assert recorded and all(torch.allclose(p.sum(-1), torch.ones(2, p.shape[1])) for p in recorded.values())


def test_impossible_configurations_are_refused(place) -> None:
    with pytest.raises(ValueError, match="weight"):
        Grounding(weight=-1)
    for changes in (
        {"text": {"folder": "runs/unet/export"}},
        {"net": "runs/unet/export"},
    ):  # no net; a tuned text tower
        with pytest.raises(ValueError, match="grounding.only: expected a net"):
            read_training_config(
                write(
                    {**place["unet"], **changes, "grounding": {"weight": 1.0, "only": True}},
                    Path("wrong.yaml"),
                )
            )


@pytest.fixture(scope="module")
def trained(shared_folder, tmp_path_factory):
    """Train a small model for a few steps; return the folder of its runs, and the configurations."""
    where, made = tmp_path_factory.mktemp("trained"), configs(shared_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for name in ("vae", "clip", "draft", "unet"):
            training = open_run(write(made[name], Path(f"{name}.yaml")))
            training.train(progress=False)
            training.export(Path(f"runs/{name}/export"))
    return where, made


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """Change to a copy of the folder with the trained model; return the configurations."""
    where, made = trained
    shutil.copytree(where, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return copy.deepcopy(made)
