"""Training of a vector-quantized autoencoder of patches: the loss, resuming, and the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainings import run, write

from ldm.models.patch_vq import PatchVQ
from ldm.training.draws import Draws
from ldm.training.run import open_run
from ldm.training.tokens.vq import VQPart
from ldm.weights.formats.ldm_folder import read_network


@pytest.fixture
def place(shared_folder, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shared_folder


def config(place: Path, **changes: Any) -> dict[str, Any]:
    return {
        "part": "vq",
        "run": run("vq"),
        "data": {"folder": str(place), "size": 32, "mix": {"background": 0.5}},
        "loss": {"l1": 1.0, "mse": 1.0, "kl": 0.0},
        "model": {"codes": 20, "factor": 4, "latent_channels": 8, "channels": [8, 16]},
        "fitted": 16,
        **changes,
    }


def opened(place: Path, **changes: Any) -> Any:
    return open_run(write(config(place, **changes), Path("vq.yaml")))


def test_only_the_decoder_is_trained_and_its_error_falls(place: Path) -> None:
    rate = {"lr": 1e-2, "warmup": 5, "decay": 100}
    trained = opened(
        place, run=run("vq", steps=200, validate_every=200, checkpoint_every=200, optimizer=rate)
    )
    part = trained.part
    assert isinstance(part, VQPart)
    frozen = {name: p.clone() for name, p in part.model.named_parameters() if not p.requires_grad}
    assert {name.partition(".")[0] for name in frozen} == {"project", "quantize"}
    drawn = Draws(0, range(64), stream=2)
    before, error = part.validate(), float(part.loss(drawn)[0])
    assert 1 <= before["perplexity"] <= 20
    trained.train(progress=False)
    after = part.validate()
    assert float(part.loss(drawn)[0]) < 0.9 * error and after["perplexity"] == before["perplexity"]
    assert all(torch.equal(part.model.get_parameter(name), p) for name, p in frozen.items())
    assert part.preview().shape[-1] == 3 and part.describe_batch(Draws(0, range(2)))


def test_a_resumed_run_equals_an_uninterrupted_one(place: Path) -> None:
    whole = opened(place)
    whole.train(progress=False)
    again = config(place, run=run("other"))
    open_run(write(again, Path("other.yaml"))).train(until=3, progress=False)
    resumed = open_run(write(again, Path("other.yaml")))
    assert resumed.step == 3
    resumed.train(progress=False)
    for name, p in whole.part.model.state_dict().items():
        assert torch.equal(p, resumed.part.model.state_dict()[name]), name


def test_the_export_has_the_tokens_of_the_run(place: Path) -> None:
    trained = opened(place)
    trained.train(progress=False)
    trained.export(Path("export"))
    network, about = read_network("export", "vae")
    assert isinstance(network, PatchVQ) and about["figures"]["psnr"] > 0
    x = trained.part.images.tensor(trained.part.images.held_out(4))
    same = network.indices(network.encode(x).mode()) == trained.part.encode(x)
    assert same.float().mean() > 0.98  # weights are rounded to 16 bits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"kl": 0.1}}, "loss.kl 0.1"),
        ({"fitted": 0}, "fitted"),
        ({"data": {"size": 30}}, "data.size 30"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(ValueError, match=message):
        opened(place, **changes)
