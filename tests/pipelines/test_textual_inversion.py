"""Textual inversion: all containers, one or two towers, long prompts, weights, and the small vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import KOHYA, kohya_lora, peers, same_bits, weights_of, written
from diffusers_pipelines import diffusers_pipeline, random_pipeline
from tiny_latent_diffusion import tiny_model
from torch import Tensor, nn

import ldm
from ldm.images.files import read_recipe
from ldm.registry.replaying import replay

TOKEN, PROMPT = "<thing>", "a photo of <thing> on a table"
N = 3


def vectors(width: int, seed: int = 0) -> Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_pipeline("sd-v1-5", "reduced", tmp_path_factory.mktemp("sd"))[0]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_pipeline("sdxl-base", "reduced", tmp_path_factory.mktemp("xl"))[0]


@pytest.fixture(autouse=True)
def _nothing_stays(sd: Any, xl: Any) -> Iterator[None]:
    before = weights_of(sd), weights_of(xl)
    yield
    for pipe, weights in zip((sd, xl), before, strict=True):
        for each in pipe.adapters.list():
            pipe.adapters.remove(each.name)
        assert same_bits(pipe, weights) and not pipe.text.readers()["text"].learned


@pytest.fixture(scope="module")
def wanted(sd: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tensor]:
    """Return diffusers' embeddings of a prompt after it has loaded the vectors."""
    folder = tmp_path_factory.mktemp("theirs")
    theirs = diffusers_pipeline(copy.deepcopy(sd), "StableDiffusionPipeline", folder)
    theirs.load_textual_inversion({TOKEN: vectors(32)})

    def embed(prompt: str) -> Tensor:
        with torch.no_grad():
            return theirs.encode_prompt(prompt, "cpu", 1, False)[0]

    return embed


def bundled(sd: Any) -> dict[str, Tensor]:
    lora = kohya_lora({"unet": peers(sd)["unet"]}, KOHYA)
    return lora | {"bundle_emb.thing.string_to_param.*": vectors(32)}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        return written(path, content)
    torch.save(content, path)
    return path


CONTAINERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "A1111": (
        "thing.pt",
        lambda _: {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": vectors(32)},
            "name": "n",
            "step": 9,
        },
    ),
    "A1111, old": (
        "thing.pt",
        lambda _: {"string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors(32))}), "name": "n"},
    ),
    "diffusers": ("learned_embeds.bin", lambda _: {TOKEN: vectors(32)}),
    "diffusers, safetensors": ("learned_embeds.safetensors", lambda _: {TOKEN: vectors(32)}),
    "kohya": ("thing.safetensors", lambda _: {"emb_params": vectors(32)}),
    "SDXL's keys": ("thing.safetensors", lambda _: {"clip_l": vectors(32)}),
    "early script": ("thing.safetensors", lambda _: {"text_encoders_0": vectors(32)}),
    "list": ("thing.pt", lambda _: [{"clip_l": vectors(32)[:1]}, {"clip_l": vectors(32)[1:]}]),
    "bundled in a LoRA": ("thing.safetensors", bundled),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_all_containers(sd: Any, wanted: Callable[[str], Tensor], tmp_path: Path, container: str) -> None:
    name, content = CONTAINERS[container]
    path = write(tmp_path / name, content(sd))
    plain = sd.text([PROMPT]).context
    loaded = sd.adapters.load(path, token=TOKEN, strength=0.0)
    assert loaded.words == (TOKEN,) and loaded.adapter.learned[0].count == N
    got = sd.text([PROMPT]).context
    assert (got - wanted(PROMPT)).abs().max() < 1e-5 < (got - plain).abs().max()
    sd.adapters.remove(loaded.name)
    assert torch.equal(sd.text([PROMPT]).context, plain)


def test_both_towers_in_one_call(xl: Any, tmp_path: Path) -> None:
    theirs = diffusers_pipeline(copy.deepcopy(xl), "StableDiffusionXLPipeline", tmp_path)
    for key, width, tower in (("clip_l", 32, ""), ("clip_g", 48, "_2")):
        theirs.load_textual_inversion(
            {TOKEN: vectors(width)},
            text_encoder=getattr(theirs, f"text_encoder{tower}"),
            tokenizer=getattr(theirs, f"tokenizer{tower}"),
        )
        assert key
    path = written(tmp_path / "thing.safetensors", {"clip_g": vectors(48), "clip_l": vectors(32)})
    xl.adapters.load(path, token=TOKEN)
    with torch.no_grad():
        context, _, pooled, _ = theirs.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    cond = xl.text([PROMPT])
    assert (cond.context - context).abs().max() < 1e-5
    # transformers reads the state at the first end-of-text token; ours must as well, whatever ids are larger
    assert (cond.pooled - pooled).abs().max() < 1e-5


def test_a_tower_without_vectors(xl: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "thing.safetensors", {"clip_g": vectors(48)})
    xl.adapters.load(path)
    assert xl.text(["a thing"]).context.shape == xl.text(["a cat"]).context.shape
    long = "thing " * 40
    assert xl.text([long]).context.shape[1] == 2 * 77  # 120 vectors in both towers


def test_the_word_is_found_in_prompts(sd: Any, wanted: Callable[[str], Tensor], tmp_path: Path) -> None:
    sd.adapters.load(written(tmp_path / "my thing.safetensors", {TOKEN: vectors(32)}))
    assert sd.adapters.list()[0].words == ("my thing", TOKEN)
    expected = wanted("a <thing>, red")
    for prompt in ("a <thing>, red", "a my thing, red", "a embedding:<thing>, red", "a MY THING, red"):
        assert (sd.text([prompt]).context - expected).abs().max() < 1e-5, prompt
    assert not torch.equal(sd.text(["a my things"]).context, sd.text(["a my thing"]).context)
    places = dict(sd.text.places("a red <thing> cat"))
    assert places["<thing>"] == [3, 4, 5] and places["cat"] == [6]
    # weights act on all vectors of the word
    weighted, plain = sd.text(["a (<thing>:1.5)"]).context, sd.text(["a <thing>"]).context
    assert not torch.equal(weighted, plain)


def test_long_prompts_keep_the_vectors_together(sd: Any, tmp_path: Path) -> None:
    sd.adapters.load(written(tmp_path / "thing.safetensors", {"emb_params": vectors(32)}))
    words = "red " * 74  # one token short of a window: the three vectors go to the next
    context = sd.text([f"{words}thing"]).context
    assert context.shape[1] == 2 * 77
    assert torch.equal(context[:, 77:], sd.text(["thing"]).context)


def test_what_is_refused(sd: Any, tmp_path: Path) -> None:
    def refused(content: Any, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            sd.adapters.load(write(tmp_path / "thing.safetensors", content), **options)
        assert len(sd.adapters) == 0 and not sd.text.learned

    refused({"emb_params": vectors(1024)}, "made for Stable Diffusion 2, changes no module")
    refused({"clip_l": vectors(32), "clip_g": vectors(48)}, "made for Stable Diffusion XL.*clip_g")
    refused({"emb_params": vectors(32) * float("nan")}, "NaN or infinity")
    refused({"emb_params": torch.zeros(0, 32)}, r"expected vectors of floating-point numbers, .*\(0, 32\)")
    refused({"emb_params": vectors(32)}, "expected a word", token=" ")
    refused(bundled(sd) | {"bundle_emb.other.string_to_param.*": vectors(32)}, "holds 2", token="x")
    first = written(tmp_path / "one.safetensors", {"emb_params": vectors(32)})
    sd.adapters.load(first, token="thing")
    with pytest.raises(ValueError, match="the word 'thing' is taken"):
        sd.adapters.load(written(tmp_path / "thing.safetensors", {"emb_params": vectors(32)}))
    with pytest.raises(ValueError, match="one: learned words are no weights"):
        sd.adapters.fuse()
    sd.adapters.remove("one")


def test_a_model_that_warns_of_words_and_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vocabulary is small, and it warns of words that it has never seen: a learned word is known."""
    ldm.save(tiny_model(), tmp_path / "assets" / "emoji-ldm")
    monkeypatch.setattr("ldm.catalog.lookup.ASSETS", tmp_path / "assets")
    pipe = ldm.load(device="cpu", dtype="float32")
    width = pipe.text.width
    path = written(tmp_path / "zorblax.safetensors", {"emb_params": vectors(width)})
    assert pipe.text.unknown("a red zorblax")
    pipe.adapters.load(path)
    assert pipe.text.unknown("a red zorblax") == []
    options: dict[str, Any] = {"steps": 2, "progress": False}
    images = pipe.text_to_image("a red zorblax", **options)
    assert not torch.equal(images.tensor, pipe.text_to_image("a red", **options).tensor)
    images.save(tmp_path / "z.png")
    assert torch.equal(replay(read_recipe(tmp_path / "z.png"), adapters=path).tensor, images.tensor)
