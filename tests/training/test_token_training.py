"""Training of a model of image tokens: the loss, a run with its export, and the model that the parts make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainings import configs, run, write

import ldm
from ldm.catalog.dalle_cards import DalleCard, TokenDefaults
from ldm.models.dalle.decoder import DalleDecoder
from ldm.models.dalle.encoder import DalleEncoder, StateEncoder
from ldm.models.patch_vq import PatchVQConfig
from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.models.vq import VQConfig
from ldm.pipelines.dalle.pipeline import DalleMini
from ldm.training.draws import Draws
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run
from ldm.training.tokens.dalle import TokenPart
from ldm.weights.formats.ldm_folder import read_network, write_part
from ldm.weights.parts import build_network, randomise

VQ = VQConfig(channels=(8, 16, 16), blocks=1, latent_channels=4, codes=300)  # more than a byte holds
SIZES = {"width": 16, "layers": 1, "heads": 2, "inner": 16}


@pytest.fixture
def place(shared_folder, tmp_path, monkeypatch) -> Path:
    """Change to a folder that holds an autoencoder with random weights; return that of the data."""
    monkeypatch.chdir(tmp_path)
    write_part(Path("vq"), "vae", randomise(build_network(VQ), 3), VQ, dtype=torch.float32)
    return shared_folder


def config(data: Path, **changes: Any) -> dict[str, Any]:
    return {
        "part": "tokens",
        "run": run("tokens"),
        "data": {"folder": str(data), "size": 32, "mix": {"background": 0.5, "small": 0.2, "two": 0.2}},
        "vae": "vq",
        "variants": 5,
        "encoder": {"vocabulary": 260, "length": 40, **SIZES},
        "decoder": {"vocabulary": 300, "length": 64, **SIZES},
        **changes,
    }


def opened(data: Path, **changes: Any) -> Any:
    return open_run(write(config(data, **changes), Path("tokens.yaml")))


def test_a_run_exports_parts_that_make_a_model(place: Path) -> None:
    trained = opened(place)
    part = trained.part
    assert isinstance(part, TokenPart)
    with torch.no_grad():
        assert 5.0 < float(part.loss(Draws(0, range(4)))[0]) < 7.0  # about log 301
    trained.train(progress=False)
    trained.export(Path("export"))
    figures = trained.part.validate()
    assert figures.keys() == {"bits", "bits_without_text"} and all(value > 0 for value in figures.values())
    encoder, decoder = (read_network("export", name)[0] for name in ("encoder", "decoder"))
    assert isinstance(encoder, DalleEncoder) and isinstance(decoder, DalleDecoder)
    sampling = TokenDefaults(guidance=1.0, top_k=300)
    card = DalleCard(
        name="own",
        family="tokens",
        summary="",
        licence="",
        side=32,
        start=300,
        signed=True,
        sampling=sampling,
    )
    pipe = DalleMini(
        encoder=encoder,
        decoder=decoder,
        vae=read_network("vq", "vae")[0],
        tokenizer=ByteTokenizer.spelling(),
        card=card,
    )
    images = pipe.text_to_image("red disc", n=1, progress=False)
    drawn = list(pipe.drawn(pipe.settle("red disc", n=1, progress=False)))[-1][1]
    with torch.no_grad():
        part.encoder.load_state_dict(encoder.state_dict())
        part.decoder.load_state_dict(decoder.state_dict())
        assert torch.equal(part.sample(["red disc"]), drawn)  # the training samples as the pipeline does
    ldm.save(pipe, "model")
    again = ldm.load(weights="model", device="cpu", dtype="float32")
    assert torch.equal(again.text_to_image("red disc", n=1, progress=False).tensor, images.tensor)


def test_cached_tokens_are_those_of_the_images(place: Path) -> None:
    part = opened(place).part
    assert isinstance(part, TokenPart)
    chosen, rows = part.scenes.draw(Draws(0, range(4)))
    halves = torch.as_tensor(part.tokens[rows]).long()
    tokens = halves[:, 0] * 256 + halves[:, 1]
    assert torch.equal(tokens, part.encode(chosen)) and int(tokens.max()) > 255
    assert part.preview().shape[-1] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"vocabulary": 300, "length": 16, **SIZES}}, "expected length 64"),
        ({"decoder": {"vocabulary": 200, "length": 64, **SIZES}}, "at least 300 tokens"),
        ({"decoder": {"vocabulary": 300, "length": 64, **SIZES, "width": 32}}, "decoder.width"),
        ({"encoder": {"vocabulary": 100, "length": 40, **SIZES}}, "encoder.vocabulary"),
        ({"drop": 1.5}, "drop"),
        ({"corrupt": 1.5}, "corrupt"),
        ({"text": "clip"}, "expected the shape of an encoder of ids"),
        ({"encoder": {"text_width": 16, "width": 16}}, "expected the shape of an encoder of ids"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(ValueError, match=message):
        opened(place, **changes)


def test_some_tokens_are_read_wrong_and_all_are_asked_for(place: Path) -> None:
    part = opened(place, corrupt=0.5).part
    assert isinstance(part, TokenPart)
    draws = Draws(0, range(16))
    tokens = part._cached(part.scenes.draw(draws)[1])
    seen = part._corrupted(tokens, draws)
    assert torch.equal(seen, part._corrupted(tokens, Draws(0, range(16))))  # a function of the draws
    kept = (seen == tokens).float().mean(1)
    assert float(kept.min()) > 0.3 and 0.6 < float(kept.mean()) < 1  # a quarter is drawn on average
    with torch.no_grad():
        wanted = part.losses(tokens, part.images.captions(part.scenes.draw(draws)[0], draws, drop=0.1), seen)
        assert float(part.loss(Draws(0, range(16)))[0]) == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert torch.equal(opened(place, run=run("none")).part._corrupted(tokens, draws), tokens)


def test_a_training_begins_with_the_weights_of_another(place: Path) -> None:
    first = opened(place)
    first.train(progress=False)
    first.export(Path("first"))
    second = opened(place, net="first", run=run("second")).part
    for part, network in second.model.items():
        source, _ = read_network("first", part)
        assert all(
            torch.equal(value, network.state_dict()[key]) for key, value in source.state_dict().items()
        )
    with pytest.raises(ValueError, match="encoder"):
        opened(place, net="first", run=run("third"), encoder={**config(place)["encoder"], "layers": 2})


def stages(data: Path) -> dict[str, dict[str, Any]]:
    """Return the stage files of a recipe of a model of image tokens."""
    source = {"folder": str(data), "size": 32, "mix": {"background": 0.5, "small": 0.2, "two": 0.2}}
    vq = {
        "part": "vq",
        "run": run("vq"),
        "data": source,
        "loss": {"kl": 0.0},
        "model": {"codes": 20, "factor": 4, "latent_channels": 8, "channels": [8, 16]},
        "fitted": 16,
    }
    tokens = {
        "part": "tokens",
        "run": run("tokens"),
        "data": source,
        "variants": 5,
        "encoder": {"text_width": 16, "width": 16, "layers": 1, "heads": 2, "inner": 16},
        "decoder": {"vocabulary": 20, "length": 64, **SIZES},
    }
    made = {"clip": configs(data)["clip"], "vq": vq, "tokens": tokens}
    for name, stage in made.items():
        del stage["run"]["name"]
        stage["run"]["steps"] = {"clip": 2, "vq": 2, "tokens": 4}[name]
    return made


def test_a_recipe_makes_a_model_that_reads_a_text_tower(place: Path) -> None:
    folder = Path("recipe")
    folder.mkdir()
    for name, stage in stages(place).items():
        write(stage, folder / f"{name}.yaml")
    card = {
        "name": "tiny-tokens",
        "family": "tokens",
        "summary": "",
        "licence": "",
        "start": 20,
        "signed": True,
        "side": 32,
        "pictures": 2,
        "sampling": {"guidance": 1.5, "top_k": 20},
    }
    write(card, folder / "card.yaml")
    parts = {"text": "clip", "encoder": "tokens", "decoder": "tokens", "vae": "vq"}
    listed = [
        {"stage": "clip", "hours": 0.1},
        {"stage": "vq", "hours": 0.1},
        {"stage": "tokens", "reads": {"vae": "vq", "text": "clip"}, "hours": 0.1},
    ]
    recipe = {
        "name": "recipe",
        "machine": "any",
        "stages": listed,
        "bundle": {"card": "card.yaml", "parts": parts},
    }
    write(recipe, folder / "recipe.yaml")
    # an interruption changes nothing
    assert train_recipe(folder, until=3, progress=False) is None
    model = train_recipe(folder, progress=False)
    whole = train_recipe(folder, runs="whole", progress=False)
    assert model is not None and whole is not None
    for part in parts:
        name = f"{part}.safetensors"
        assert (model / name).read_bytes() == (whole / name).read_bytes(), part
    pipe = ldm.load(weights=model, device="cpu", dtype="float32")
    assert isinstance(pipe, DalleMini) and isinstance(pipe.encoder, StateEncoder)
    assert list(pipe.networks()) == ["text", "encoder", "decoder", "vae"]
    images = pipe.text_to_image("red disc", progress=False)
    assert images.tensor.shape == (2, 3, 32, 32)
    ldm.save(pipe, "copy")
    copy = ldm.load(weights="copy", device="cpu", dtype="float32")
    assert torch.equal(copy.text_to_image("red disc", progress=False).tensor, images.tensor)
    assert {"text", "encoder", "decoder", "vae", "vocabulary.json"} <= set(pipe.origin)


def test_the_training_of_a_tower_s_encoder_samples_as_the_pipeline_does(place: Path) -> None:
    open_run(write(configs(place)["clip"], Path("clip.yaml"))).export(Path("clip"))
    vq = PatchVQConfig(codes=300, factor=4, latent_channels=8, channels=(8, 16))
    write_part(Path("vq"), "vae", randomise(build_network(vq), 3), vq, dtype=torch.float32)
    shape = {"text_width": 16, "width": 16}
    part = opened(place, encoder=shape, text="clip").part
    assert isinstance(part, TokenPart) and part.model["encoder"] is part.encoder
    assert not any(p.requires_grad for p in part.texts.networks()["text"].parameters())
    card = DalleCard(
        name="own",
        family="tokens",
        summary="",
        licence="",
        side=32,
        start=300,
        signed=True,
        sampling=TokenDefaults(guidance=1.0, top_k=300),
    )
    assert isinstance(part.encoder, StateEncoder)
    pipe = DalleMini(
        encoder=part.encoder, decoder=part.decoder, vae=part.vae, card=card, text=part.texts.tower
    )
    with torch.no_grad():
        drawn = list(pipe.drawn(pipe.settle("red disc", n=1, progress=False)))[-1][1]
    assert torch.equal(part.sample(["red disc"]), drawn)
