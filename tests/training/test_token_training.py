"""Training of a model of image tokens: the loss, a run with its export, and the model that the parts make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_exemplar_training import exemplar_configs
from tiny_trainings import run, write

import ldm
from ldm.catalog.dalle_cards import DalleCard, TokenDefaults
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.token_texts import EncodedTexts, ExemplarTexts, encode_condition
from ldm.models.dalle.decoder import DalleDecoder
from ldm.models.dalle.encoder import DalleEncoder, StateEncoder
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
SHOWN = {"text_width": 16, "width": 16, "cell": 4}


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
        assert isinstance(part.encoder, DalleEncoder)
        part.encoder.load_state_dict(encoder.state_dict())
        part.decoder.load_state_dict(decoder.state_dict())
        states = EncodedTexts(ByteTokenizer.spelling(), part.encoder).encode(["red disc"])
        assert torch.equal(part.sample(states), drawn)  # the training samples as the pipeline does
    ldm.save(pipe, "model")
    again = ldm.load(weights="model", device="cpu", dtype="float32")
    assert torch.equal(again.text_to_image("red disc", n=1, progress=False).tensor, images.tensor)


def test_cached_tokens_are_those_of_the_images(place: Path) -> None:
    part = opened(place).part
    assert isinstance(part, TokenPart)
    chosen, rows = part.reader.draw(Draws(0, range(4)))
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
        ({"encoder": SHOWN, "text": "text", "variants": 0}, "variants: expected at least 1"),
        ({"encoder": {**SHOWN, "slots": 9}, "text": "text"}, "slots 9: expected 1 to "),
        ({"encoder": {**SHOWN, "cell": 8}, "text": "text"}, "cell: expected 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(ValueError, match=message):
        opened(place, **changes)


def test_some_tokens_are_read_wrong_and_all_are_asked_for(place: Path) -> None:
    part = opened(place, corrupt=0.5).part
    assert isinstance(part, TokenPart)
    draws = Draws(0, range(16))
    chosen, rows = part.reader.draw(draws)
    tokens = part._cached(rows)
    seen = part._corrupted(tokens, draws)
    assert torch.equal(seen, part._corrupted(tokens, Draws(0, range(16))))  # a function of the draws
    kept = (seen == tokens).float().mean(1)
    assert float(kept.min()) > 0.3 and 0.6 < float(kept.mean()) < 1  # a quarter is drawn on average
    with torch.no_grad():
        wanted = part.losses(tokens, seen, part.reader.drawn(chosen, draws, 0.1))
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
    """Return the stage files of a recipe of a model of image tokens with exemplars."""
    made = {name: exemplar_configs(data)[name] for name in ("vae", "exemplar", "layout")}
    source = {**made["vae"]["data"], "size": 32}
    made["vq"] = {
        "part": "vq",
        "run": run("vq"),
        "data": source,
        "loss": {"kl": 0.0},
        "model": {"codes": 20, "factor": 4, "latent_channels": 8, "channels": [8, 16]},
        "fitted": 16,
    }
    made["tokens"] = {
        "part": "tokens",
        "run": run("tokens"),
        "data": source,
        "variants": 12,
        "corrupt": 0.2,
        "encoder": {"text_width": 16, "width": 24, "cell": 4},
        "decoder": {"vocabulary": 20, "length": 64, **SIZES, "width": 24},
    }
    for stage in made.values():
        del stage["run"]["name"]
        stage["run"]["steps"] = 4
        for key in ("vae", "text"):
            if isinstance(stage.get(key), str):
                del stage[key]
    return made


CARD = {
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


def write_recipe(data: Path, folder: Path) -> dict[str, str]:
    """Write a recipe into a folder, and return the stage of each part of its model."""
    folder.mkdir()
    for name, stage in stages(data).items():
        write(stage, folder / f"{name}.yaml")
    write(CARD, folder / "card.yaml")
    reads = {
        "exemplar": {"vae": "vae"},
        "layout": {"text": "exemplar"},
        "tokens": {"vae": "vq", "text": "exemplar"},
    }
    parts = {"text": "exemplar", "layout": "layout", "encoder": "tokens", "decoder": "tokens", "vae": "vq"}
    recipe = {
        "name": "recipe",
        "machine": "any",
        "stages": [{"stage": name, "hours": 0.1, "reads": reads.get(name, {})} for name in stages(data)],
        "bundle": {"card": "card.yaml", "parts": parts},
    }
    write(recipe, folder / "recipe.yaml")
    return parts


def test_a_recipe_makes_a_model_that_is_shown_exemplars(place: Path) -> None:
    folder = Path("recipe")
    parts = write_recipe(place, folder)
    # an interruption changes nothing
    assert train_recipe(folder, until="vq", progress=False) is None
    assert train_recipe(folder, until=3, progress=False) is None
    model = train_recipe(folder, progress=False)
    whole = train_recipe(folder, runs="whole", progress=False)
    assert model is not None and whole is not None
    for part in parts:
        name = f"{part}.safetensors"
        assert (model / name).read_bytes() == (whole / name).read_bytes(), part
    pipe = ldm.load(weights=model, device="cpu", dtype="float32")
    assert isinstance(pipe, DalleMini) and isinstance(pipe.encoder, StateEncoder)
    assert list(pipe.networks()) == ["text", "layout", "encoder", "decoder", "vae"]
    images = pipe.text_to_image("a red disc", progress=False)
    assert images.tensor.shape == (2, 3, 32, 32)
    assert {*parts, "vocabulary.json", "library.json", "library.safetensors"} <= set(pipe.origin)
    part = open_run(folder / "tokens.yaml").part
    assert isinstance(part, TokenPart)
    check_sampling(part, pipe)


def check_sampling(part: TokenPart, pipe: DalleMini) -> None:
    """Check that a finished training samples as the pipeline of its weights does."""
    assert isinstance(pipe.text, ExemplarConditioner) and isinstance(pipe.texts, ExemplarTexts)
    assert not any(p.requires_grad for p in part.reader.text.parameters())  # type: ignore[attr-defined]
    call = pipe.settle("a red disc", n=1, guidance=1.0, progress=False)
    drawn = list(pipe.drawn(call))[-1][1]
    with torch.no_grad():
        for name, network in part.model.items():
            network.load_state_dict(pipe.networks()[name].state_dict())
        states = encode_condition(part.encoder, pipe.texts.condition(["a red disc"], [0]))  # type: ignore[arg-type]
        assert torch.equal(part.sample(states), drawn)


def test_a_training_with_exemplars_begins_by_copying_them(place: Path) -> None:
    folder = Path("recipe")
    write_recipe(place, folder)
    train_recipe(folder, until="vq", progress=False)
    part = open_run(folder / "tokens.yaml").part
    assert isinstance(part, TokenPart)
    scenes = [scene for scene in part.images.held_out(16) if scene.facts.background is None]
    tokens = part.encode(scenes)
    read = torch.cat([torch.full_like(tokens[:, :1], 20), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        shown, nothing = part.reader.canonical(scenes), part.reader.nothing(len(scenes))
        right, alone = (
            (part.decoder(read, each.states, each.mask, each.shown).argmax(-1) == tokens).float().mean()
            for each in (shown, nothing)
        )
    assert right > 0.7 > alone
