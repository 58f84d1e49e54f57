"""Training with exemplars: the captions' slots, the condition, exact resumption, and a model that loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_trainings import run, write

import ldm
from ldm.catalog.cards import Defaults, ModelCard, ScheduleCard
from ldm.catalog.unclip_cards import StageCard, UnCLIPCard
from ldm.conditioning.exemplar_index import on_white
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.things import SLOT_WORDS, Lexicon
from ldm.data import EmojiData, Mix, plain_scene, render_batch, sample_scene
from ldm.data.captions import caption_pieces, join_captions
from ldm.data.facts import STYLES
from ldm.data.wording import grammar_words
from ldm.models.dit import DiT
from ldm.models.layout import ThingLayout, place_exemplars
from ldm.models.patch_autoencoder import PatchAutoencoder
from ldm.registry.bundling import bundle
from ldm.samplers.conventions import Convention
from ldm.support.config import to_dict
from ldm.training.caches.embeddings import clip_name
from ldm.training.caches.pairs import draw_latents
from ldm.training.draws import Draws
from ldm.training.inputs.slots import SlotCaption, named_on_canvas
from ldm.training.parts.exemplar import SLOT_TEXT
from ldm.training.parts.layout import training_library
from ldm.training.run import open_run
from ldm.weights.formats.exemplar_file import read_library
from ldm.weights.formats.ldm_folder import read_network, read_text
from ldm.weights.formats.ldm_model import write_card


@pytest.fixture
def place(shared_folder, tmp_path, monkeypatch):
    """Change to an empty folder, and return that of the drawn data set."""
    monkeypatch.chdir(tmp_path)
    return shared_folder


@pytest.fixture(scope="module")
def trained_once(shared_folder, tmp_path_factory):
    """Return a folder in which all parts were trained and exported."""
    once = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(once)
        for name, config in exemplar_configs(shared_folder).items():
            part = open_run(write(config, Path(f"{name}.yaml")))
            part.train(progress=False)
            part.export(Path(f"runs/{name}/export"))
    return once


@pytest.fixture
def trained(trained_once, place, tmp_path):
    """Change to a copy of the folder in which all parts were trained, and return that of the data set."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return place


def exemplar_configs(data: Path) -> dict[str, dict[str, Any]]:
    """Return the configurations of the three trainings over a data set's folder."""
    size = EmojiData.open(data).images.shape[1]
    source = {"folder": str(data), "size": size, "mix": {"background": 0.5, "two": 0.4}}
    muon = {"kind": "muon", "lr": 1e-3, "warmup": 2, "decay": 2}
    vae = {
        "part": "vae",
        "run": run("vae", optimizer=muon),
        "data": source,
        "loss": {"l1": 1.0, "mse": 2.0, "edge": 0.5, "kl": 0.0},
        "model": {"factor": 4, "latent_channels": 6, "channels": [8, 16]},
    }
    shape = {"width": 16, "depth": 1, "head_dim": 8, "context_dim": 16}
    net = {
        "part": "exemplar",
        "run": run("exemplar", optimizer=muon),
        "data": source,
        "vae": "runs/vae/export",
        "scenes": 12,
        "text": {"layers": 1, "heads": 2},
        "diffusion": {"schedule": "cosine", "prediction": "x0", "snr_plus_one": 8, "drop": 0.2},
        "model": {"in_channels": 6, "out_channels": 6, "slots": 2, "cell": 4, **shape},
    }
    layout = {
        "part": "layout",
        "run": run("layout", optimizer=muon),
        "data": source,
        "text": "runs/exemplar/export",
        "model": {"in_channels": 6, "out_channels": 6, "patch": 1, **shape},
    }
    one_step = {**layout, "run": run("one-step", optimizer=muon), "teacher": "runs/layout/export"}
    towers = {"layers": 1, "heads": 2, "activation": "gelu", "embed_dim": 16, "width": 16}
    clip = {
        "part": "clip",
        "run": run("clip"),
        "data": source,
        "model": {"text": towers, "vision": {**towers, "image_size": size, "patch_size": size // 4}},
    }
    condition = {
        "embed_dim": 16,
        "interleaved": False,
        "text_dim": 16,
        "pooled_dim": None,
        "norms": ["tokens"],
    }
    decoder = {
        **net,
        "part": "exemplar-decoder",
        "run": run("decoder", optimizer=muon),
        "net": "runs/exemplar/export",
        "vision": "runs/clip/export",
        "condition": condition,
    }
    grounded = {
        **net,
        "run": run("grounded", optimizer=muon),
        "net": "runs/exemplar/export",
        "grounding": 0.5,
    }
    return {
        "vae": vae,
        "exemplar": net,
        "layout": layout,
        "one-step": one_step,
        "grounded": grounded,
        "clip": clip,
        "decoder": decoder,
    }


EXPORTS = {
    "vae": "runs/vae/export",
    **dict.fromkeys(("unet", "text"), "runs/exemplar/export"),
    "layout": "runs/layout/export",
}


def exemplar_card(data: Path, **defaults: Any) -> ModelCard:
    """Return the card of the model that the exports make."""
    size = EmojiData.open(data).images.shape[1]
    return ModelCard(
        name="tiny",
        family="latent",
        summary="a model of the tests",
        licence="none",
        schedule=ScheduleCard(kind="cosine"),
        prediction="x0",
        text=SLOT_TEXT,
        convention=Convention(grids={"*": {"spacing": "trailing"}}),
        defaults=Defaults(
            **{"sampler": "dpmpp_2m", "steps": 2, "guidance": 1.0, "height": size, "width": size, **defaults}
        ),
    )


def test_the_captions_that_training_reads_are_those_that_prompts_are_read_as(place):
    data = EmojiData.open(place)
    library = training_library(data)
    lexicon = Lexicon(nouns=library.nouns, styles=STYLES, grammar=frozenset(grammar_words()))
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng, data.index, Mix())
        if any(thing.name.startswith(f"{thing.colour}-") for thing in scene.facts.things):
            continue  # "a blue box", recoloured or not
        pieces = caption_pieces(scene.facts, data.index, rng)
        caption = SlotCaption.of(pieces)
        read = lexicon.read(join_captions([pieces])[0], slots=2)
        assert read.text == " ".join(caption.words) and read.unknown == ()
        names = [scene.facts.things[thing].name for thing in caption.order]
        for name, mention in zip(names, read.mentions, strict=True):
            if mention.phrase != "cat face":  # the name of one thing, and a tag of another
                assert name in mention.names
        styles = [scene.facts.things[thing].style for thing in caption.order]
        assert [mention.style for mention in read.mentions] == styles


def test_a_model_is_trained_from_nothing_and_loads_with_its_library(trained):
    vae, about = read_network("runs/vae/export", "vae")
    assert isinstance(vae, PatchAutoencoder) and abs(about["latent_scale"] - 1) < 0.2
    library = read_library("runs/layout/export")
    data = EmojiData.open(trained)
    held_out = {(data.index[row].name, data.index[row].style) for row in map(int, data.held_out)}
    assert len(library) == len(data.train)
    assert not held_out & {(exemplar.name, exemplar.style) for exemplar in library}
    text = read_text("runs/exemplar/export", SLOT_TEXT)
    assert text.known_words == frozenset(grammar_words())
    layout, _ = read_network("runs/layout/export", "layout")
    assert isinstance(layout, DiT)
    assert ExemplarConditioner(text, layout, library, cell=4).unknown("a cat") == []


@pytest.mark.parametrize("kind", ["exemplar", "layout", "one-step", "grounded", "decoder"])
def test_training_is_resumed_exactly(trained, kind):
    whole = open_run(Path(f"{kind}.yaml"))
    config = exemplar_configs(trained)[kind]
    config["run"]["name"] = "halves"
    path = write(config, Path("halves.yaml"))
    open_run(path).train(until=4, progress=False)
    halves = open_run(path)
    assert halves.step == 4 < whole.step
    halves.train(progress=False)
    for a, b in zip(whole.part.model.parameters(), halves.part.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_condition_shows_the_images_of_the_scene(trained):
    part = open_run(Path("exemplar.yaml")).part
    scenes, rows = part.draw(Draws(0, range(6)))
    assert [part.scenes.rows[row] for row in rows] == scenes
    part.model.eval()
    cond = part.condition([*scenes, None], None)
    assert cond.exemplars.shape[1:3] == (2, 4)
    data = part.images.data
    for canvas, scene in zip(cond.exemplars, scenes, strict=False):
        plain = replace(
            scene.facts, things=tuple(replace(thing, colour=None) for thing in scene.facts.things)
        )
        drawn = render_batch(
            [replace(scene, facts=replace(plain, background=None))], data.images, part.images.size
        )
        on_white = canvas[:, :3].sum(0) + 1 - canvas[:, 3].sum(0)  # (3, H, W)
        error = (on_white - torch.from_numpy(drawn[0]).permute(2, 0, 1) / 255).abs()
        assert error.mean() < 0.02 and error.square().mean().sqrt() < 0.06
        assert bool(canvas[1].any()) == (len(scene.facts.things) == 2)
    assert not cond.exemplars[-1].any() and cond.context_mask[-1].any()
    alone = part.condition(scenes[:1], None)
    length = alone.context.shape[1]
    kept = alone.context_mask[0]
    assert torch.allclose(cond.context[0, :length][kept], alone.context[0][kept], atol=1e-5)
    moved = part.condition(scenes, Draws(0, range(6)).rngs, displaced=0.05)
    assert 0.001 < (moved.exemplars - cond.exemplars[:-1]).abs().mean() < 0.2


def test_words_name_the_areas_that_their_things_cover(trained):
    config = {**exemplar_configs(trained)["grounded"], "run": run("begun")}
    part = open_run(write(config, Path("begun.yaml"))).part
    begun, _ = read_network("runs/exemplar/export", "unet")
    for own, given in zip(part.net.parameters(), begun.parameters(), strict=True):
        assert torch.equal(own, given)
    scene = next(
        scene
        for scene in part.images.random(np.random.default_rng(3), 200)
        if len(scene.facts.things) == 2 and scene.facts.background is not None
    )
    caption = part.captions([scene], None)[0]
    canvas = part.condition([scene], None).exemplars
    first, second, background = named_on_canvas([caption], canvas, part.text.tokenizer)
    ids = part.text.tokenizer.encode(" ".join(caption.words))
    for slot, named in enumerate((first, second)):
        assert named.sample == 0 and torch.equal(named.area, canvas[0, slot, 3])
        noun = part.text.tokenizer.encode(SLOT_WORDS[slot])
        assert [ids[position - 1] for position in named.tokens][-len(noun) :] == noun
    assert torch.allclose(background.area, 1 - canvas[0, :, 3].sum(0), atol=1e-6)
    said = part.text.tokenizer.encode(f"{scene.facts.background} background")
    assert [ids[position - 1] for position in background.tokens] == said
    assert not set(first.tokens) & set(second.tokens)


def test_grounding_is_learned(trained):
    changes = {"grounding": 10.0, "run": run("lies", steps=60, optimizer={"kind": "adamw", "lr": 3e-3})}
    path = write({**exemplar_configs(trained)["grounded"], **changes}, Path("lies.yaml"))
    open_run(path).train(progress=False)
    lines = map(json.loads, Path("runs/lies/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [line["grounding"] for line in lines if "grounding" in line]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"slots": 5}}, "model.slots 5: expected 1 to 4"),
        ({"model": {"slots": 0}}, "model.slots 0: expected 1 to 4"),
        ({"displaced": -1}, "displaced: expected at least 0"),
        ({"grounding": -1}, "grounding: expected at least 0"),
        ({"diffusion": {"min_snr": 5}}, "expected one of min_snr and snr_plus_one"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(place, change, message):
    config = exemplar_configs(place)["exemplar"]
    for key, values in change.items():
        config[key] = {**config.get(key, {}), **values} if isinstance(values, dict) else values
    Path("wrong.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_run(Path("wrong.yaml"))


def test_the_bundled_model_shows_the_network_what_the_training_showed(trained):
    bundle(exemplar_card(trained), EXPORTS, "model")
    pipe = ldm.load(weights="model", dtype="float32")
    part = open_run(Path("exemplar.yaml")).part
    part.model.eval()
    scene = next(s for s in part.scenes.rows if len(s.facts.things) == 1)
    row = part.images.index[scene.rows()[0]]
    prompt = f"{row.style} {row.name.replace('-', ' ')}"
    image = pipe.text_to_image(prompt, seed=1, progress=False).tensor
    assert image.shape == (1, 3, *[part.images.size] * 2)
    layout = ThingLayout(places=torch.tensor([[[0.5, 0.5, 1.0, 0.0]]]), owner=torch.tensor([[0]]))
    shown = pipe.text.draw_things([pipe.text.read(prompt)], [1])[0].images
    whole = plain_scene(part.images.index, scene.rows()[0])
    wanted = part.condition([whole], None).exemplars
    torch.testing.assert_close(place_exemplars(shown, layout, image.shape[2:]), wanted)


def test_a_decoder_begins_as_the_transformer_that_it_is_made_of(trained):
    config = {**exemplar_configs(trained)["decoder"], "run": run("begun")}
    part = open_run(write(config, Path("begun.yaml"))).part
    net, _ = read_network("runs/exemplar/export", "unet")
    scenes = part.draw(Draws(0, range(4)))[0]
    part.model.eval()
    cond = part.condition(scenes, None)
    read = part.decoder.condition(cond)
    assert torch.equal(read.context[:, 4:], cond.context) and torch.equal(read.exemplars, cond.exemplars)
    assert read.context_mask[:, :4].all() and read.pooled is None and read.image_emb is None
    for own, given in zip(part.decoder.dit.parameters(), net.parameters(), strict=True):
        assert torch.equal(own, given)
    wanted = part.clip.image_embedding((part.images.tensor(scenes) + 1) / 2).vector
    torch.testing.assert_close(cond.image_emb, wanted)
    assert torch.equal(part.embedded([None, scenes[0]])[0], part.decoder.condition.nothing()[0])


def test_captions_and_embeddings_are_dropped_in_their_shares(trained):
    changes = {"bare": 0.5, "drop_image": 0.25, "run": run("shares")}
    config = exemplar_configs(trained)["decoder"]
    config = {**config, **changes, "diffusion": {**config["diffusion"], "drop": 0.2}}
    part = open_run(write(config, Path("shares.yaml"))).part
    draws = Draws(0, range(400))
    scenes, _ = part.draw(draws)
    cond, captions = part.drawn_condition(scenes, draws)
    none = part.decoder.condition.nothing()[0]
    absent = (cond.image_emb == none).all(dim=1).float().mean()
    assert abs(float(absent) - (1 - 0.8 * 0.75)) < 0.08
    empty = np.mean([not caption.words for caption in captions])
    assert abs(empty - 0.2) < 0.07
    single = [caption for caption in captions if len(caption.order) == 1]
    assert 0.4 < np.mean([caption.words == SLOT_WORDS[:1] for caption in single]) < 0.75
    assert all(len(caption.words) > 1 for caption in captions if len(caption.order) == 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": None}, "net: expected the folder of a training of exemplars, got null"),
        ({"grounding": 0.1}, "grounding 0.1: expected 0"),
        ({"bare": 1.5}, "bare"),
        ({"condition": {"text_dim": 8}}, "expected text_dim 16, the width of the text's tokens"),
        ({"condition": {"embed_dim": 8}}, "condition.embed_dim 8: the embeddings of .* are 16 wide"),
        ({"condition": {"pooled_dim": 16}}, "dit: it takes no vector"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(trained, change, message):
    config = exemplar_configs(trained)["decoder"]
    for key, values in change.items():
        config[key] = {**config[key], **values} if isinstance(values, dict) else values
    with pytest.raises(ValueError, match=message):
        open_run(write(config, Path("wrong.yaml")))


def test_a_prior_over_layouts_is_distilled_into_one_evaluation(trained):
    config = exemplar_configs(trained)["one-step"]
    config["run"] = run("longer", steps=60, optimizer={"kind": "muon", "lr": 2e-2, "warmup": 2, "decay": 40})
    part = open_run(write(config, Path("longer.yaml")))
    teacher, student = part.part.teacher, part.part
    assert all(map(torch.equal, student.net.state_dict().values(), teacher.net.state_dict().values()))
    with torch.no_grad():
        before = student.validate()["loss"]
    part.train(progress=False)
    with torch.no_grad():
        assert student.validate()["loss"] < 0.5 * before
    part.export(Path("runs/longer/export"))
    bundle(exemplar_card(trained), {**EXPORTS, "layout": "runs/longer/export"}, "model")
    for folder in ("model", "again"):
        pipe, rows = ldm.load(weights=folder, dtype="float32"), []
        assert pipe.text.layout_steps == 1
        hook = pipe.text.layout.register_forward_hook(lambda *_, rows=rows: rows.append(1))
        pipe.text_to_image("a cat", progress=False)
        hook.remove()
        assert len(rows) == 1
        ldm.save(pipe, "again")


def test_the_teacher_of_layouts_must_fit(trained):
    config = exemplar_configs(trained)["one-step"]
    config["model"] |= {"in_channels": 7, "out_channels": 7}
    with pytest.raises(ValueError, match="teacher: .* in_channels 6, context_dim 16: expected .* 7 and 16"):
        open_run(write(config, Path("other.yaml")))


def test_a_model_with_a_layout_of_its_own_shares_the_library_of_its_text_tower(trained):
    bundle(exemplar_card(trained), EXPORTS, "whole")
    Path("own").mkdir()
    for name in ("layout.yaml", "layout.safetensors"):
        shutil.copy(f"runs/one-step/export/{name}", f"own/{name}")
    parts = dict.fromkeys(("unet", "vae", "text"), "../whole")
    write_card(Path("own"), replace(exemplar_card(trained), parts=parts))
    pipe = ldm.load(weights="own", dtype="float32")
    assert pipe.text.layout_steps == 1 and len(pipe.exemplars) == len(EmojiData.open(trained).train)
    with Path("whole/library.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"library\.json"):
        ldm.load(weights="own", dtype="float32")


def test_a_bundled_unclip_model_finds_the_thing_of_an_image(trained):
    size = EmojiData.open(trained).images.shape[1]
    drawn = {
        "schedule": ScheduleCard(kind="cosine"),
        "convention": Convention(grids={"*": {"spacing": "trailing"}}),
    }
    card = UnCLIPCard(
        name="tiny-unclip",
        summary="a model of the tests",
        licence="none",
        clip=clip_name("runs/clip/export"),
        decoder=StageCard(prediction="x0", defaults=Defaults.square("ddim", 2, 1.0, size), **drawn),
        words=SLOT_TEXT,
    )
    exports = {
        **dict.fromkeys(("decoder", "words"), "runs/decoder/export"),
        **dict.fromkeys(("text", "vision"), "runs/clip/export"),
        "vae": EXPORTS["vae"],
        "layout": EXPORTS["layout"],
    }
    bundle(card, exports, "model")
    pipe = ldm.load(weights="model", dtype="float32")
    text = pipe.decoder.text
    assert len(pipe.exemplars) == len(EmojiData.open(trained).train)
    exemplar = next(iter(text.library))
    image = on_white(text.library.pixels(exemplar)[None], size)
    assert text.index.nearest(pipe.embed(image).vector[0]) is exemplar
    assert pipe.variations(image, n=2, progress=False).tensor.shape == (2, 3, size, size)
    again = ldm.save(pipe, "again")
    saved = ldm.load(weights=again, dtype="float32").decoder.text.index
    torch.testing.assert_close(saved.vectors(), text.index.vectors(), atol=2e-3, rtol=0)
    assert torch.equal(saved.metric.weight, text.index.metric.weight)
    Path("model/library-embeddings.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="library-embeddings.safetensors"):
        ldm.load(weights="model", dtype="float32")


def test_a_student_of_a_model_with_exemplars_takes_the_place_of_its_transformer(trained):
    Path("card.yaml").write_text(yaml.safe_dump(to_dict(exemplar_card(trained))), encoding="utf-8")
    config = {
        "part": "reflow",
        "run": run("turbo", steps=2),
        "teacher": {"card": "card.yaml", "parts": EXPORTS, "steps": 3},
        "data": exemplar_configs(trained)["exemplar"]["data"],
        "pairs": 66,
        "grids": [1, 2],
    }
    part = open_run(write(config, Path("turbo.yaml")))
    pairs = part.part.pairs
    assert len(set(pairs.prompts)) > 20
    drawn = draw_latents(part.part.teacher, pairs.prompts[:4], range(4), steps=3)
    torch.testing.assert_close(pairs.latent(range(4)), drawn, atol=5e-3, rtol=2e-3)  # kept in float16
    part.train(progress=False)
    part.export(Path("runs/turbo/export"))
    card = exemplar_card(trained, sampler="ddim", steps=1)
    bundle(card, {**EXPORTS, "unet": "runs/turbo/export"}, "student")
    pipe = ldm.load(weights="student", dtype="float32")
    rows = [64, 65]
    prompts = [part.part.pairs.prompts[row] for row in rows]
    image = pipe.text_to_image(prompts, seed=rows, progress=False).tensor
    with part.ema.swapped():
        wanted = part.part.teacher.decode(part.part.sample(rows, part.part.grids[0]))
    torch.testing.assert_close(image, wanted, atol=5e-3, rtol=0)  # weights are kept in float16
