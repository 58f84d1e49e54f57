"""`DalleMini`: calls, seeds, recipes, previews, inpainting by known tokens, variations, ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_peers import min_dalle_models, peer_networks, peer_tokens
from PIL import Image
from tiny_dalle import CARD, DECODER, register_tiny, tiny_dalle
from tiny_unclip import tiny_karlo
from torch import Tensor

import ldm
from ldm.catalog.dalle_cards import DalleNetworks, TokenDefaults
from ldm.images.files import read_recipe
from ldm.models.dalle.detokenizer import Detokenizer, DetokenizerConfig
from ldm.models.safety import SafetyChecker
from ldm.pipelines.dalle.pipeline import CutPrompt, DalleMini
from ldm.pipelines.dalle.token_images import ABSENT
from ldm.registry.replaying import replay
from ldm.weights.parts import build_network, randomise

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def pipe() -> DalleMini:
    return tiny_dalle()


def drawn(pipe: DalleMini, prompt: str, known: Tensor | None = None, **options: Any) -> Tensor:
    """Return the tokens (B, N) that a call draws."""
    call = pipe.settle(prompt, **QUIET, **options)
    with torch.no_grad():
        return list(pipe.drawn(call, known))[-1][1]


# Calls


def test_images_and_their_recipe(pipe: DalleMini) -> None:
    images = pipe.text_to_image("a red apple", seed=7, **QUIET)
    assert images.tensor.shape == (4, 3, 64, 64) and images.seeds == (7, 8, 9, 10)
    assert 0 <= images.tensor.min() and images.tensor.max() <= 1 and images.tensor.std() > 0
    recipe = images.recipe
    assert recipe["task"] == "text_to_image" and recipe["prompt"] == "a red apple" and recipe["replayable"]
    stated = {name: recipe[name] for name in ("guidance", "temperature", "top_k", "top_p", "n", "negative")}
    assert stated == {
        "guidance": 16.0,
        "temperature": 1.0,
        "top_k": 256,
        "top_p": 1.0,
        "n": 4,
        "negative": "",
    }


def test_an_image_belongs_to_its_seed(pipe: DalleMini) -> None:
    together = drawn(pipe, "a red apple", n=3, seed=5)
    assert torch.equal(drawn(pipe, "a red apple", n=1, seed=6), together[1:2])
    assert torch.equal(drawn(pipe, "a red apple", n=2, seed=[7, 5]), together[[2, 0]])
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_several_prompts(pipe: DalleMini) -> None:
    images = pipe.text_to_image(["a red apple", "a cat"], n=2, seed=1, **QUIET)
    assert images.prompts == ("a red apple", "a red apple", "a cat", "a cat")
    alone = pipe.text_to_image("a cat", n=2, seed=3, **QUIET)
    assert torch.allclose(images.tensor[2:], alone.tensor, atol=1e-5)


def test_options_change_the_tokens(pipe: DalleMini) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"guidance": 16.0},
        {"guidance": 1.0},
        {"guidance": 0.0},
        {"temperature": 3.0},
        {"top_k": 2},
        {"top_p": 0.1},
        {"negative": "blue"},
        {"seed": 9},
    ]
    found = {
        tuple(drawn(pipe, "a red apple", n=1, **{"guidance": 2.0, **each})[0].tolist()) for each in options
    }
    assert len(found) == len(options)


def test_guidance_of_one_and_zero_need_one_branch(pipe: DalleMini) -> None:
    for guidance, near in ((1.0, 1.0 + 1e-6), (0.0, 1e-6)):
        tokens = [drawn(pipe, "a cat", n=2, guidance=each) for each in (guidance, near)]
        assert torch.equal(*tokens)
    assert torch.equal(drawn(pipe, "a", n=1, guidance=0.0), drawn(pipe, "b", n=1, guidance=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: expected 0 to"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0}, "top_p: expected a number above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance": float("inf")}, "guidance"),
        ({"n": 0}, "n: expected"),
        ({"seed": -1}, "seed"),
        ({"steps": 3}, "has no option 'steps'"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"height": 32}, "height: 'tiny-dalle' makes images of 64×64"),
        ({"on_step": 3}, "on_step"),
        ({"negative": 3}, "negative"),
        ({"keep_steps": "yes"}, "keep_steps"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, pipe: DalleMini) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.text_to_image("a cat", **{"n": 1, **QUIET, **options})


def test_the_size_of_the_model_may_be_given(pipe: DalleMini) -> None:
    assert pipe.text_to_image("a", n=1, width=64, height=64, **QUIET).tensor.shape[-1] == 64


def test_long_prompts_are_cut_with_a_warning(pipe: DalleMini) -> None:
    with pytest.warns(CutPrompt, match="reads 12 tokens"):
        cut = drawn(pipe, "z" * 40, n=1)
    with pytest.warns(CutPrompt):
        assert torch.equal(cut, drawn(pipe, "z" * 50, n=1))


def test_wrong_prompts_are_refused(pipe: DalleMini) -> None:
    for prompt in ([], 3, ["a", 3]):
        with pytest.raises(ValueError, match="prompt"):
            pipe.text_to_image(prompt, **QUIET)  # type: ignore[arg-type]


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
def test_pytorchs_defaults_change_nothing(default: str, pipe: DalleMini) -> None:
    plain = pipe.text_to_image("a red apple", n=1, top_p=0.9, **QUIET).tensor
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, default))
        images = pipe.text_to_image("a red apple", n=1, top_p=0.9, **QUIET).tensor
        changed = pipe.variations(plain, n=1, **QUIET).tensor
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert images.dtype == torch.float32 and torch.equal(images, plain)
    assert torch.equal(changed, pipe.variations(plain, n=1, **QUIET).tensor)


# Steps


def test_hooks_see_every_token(pipe: DalleMini) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []

    def hook(count: int, tokens: Tensor, images: Any) -> None:
        seen.append((count, tokens, images() if count in (6, 16) else torch.empty(0)))

    images = pipe.text_to_image("a red apple", n=2, on_step=hook, **QUIET)
    assert [count for count, _, _ in seen] == list(range(1, 17))
    assert all(((tokens != ABSENT).sum(1) == count).all() for count, tokens, _ in seen)
    assert torch.equal(seen[-1][2], images.tensor)
    half = seen[5][2]  # one row and two tokens
    assert (half[:, :, 32:] == 0.5).all() and (half[:, :, 16:32, 32:] == 0.5).all()
    assert not (half[:, :, :16] == 0.5).all()
    assert not images.recipe["replayable"]


def test_rows_are_kept_for_an_animation(pipe: DalleMini, tmp_path: Path) -> None:
    images = pipe.text_to_image("a red apple", n=2, keep_steps=True, **QUIET)
    assert images.steps is not None and images.steps.shape == (4, 2, 3, 64, 64)
    assert torch.equal(images.steps[-1], images.tensor)
    assert (images.steps[0][:, :, 16:] == 0.5).all()
    images.animate(tmp_path / "rows.gif")
    assert Image.open(tmp_path / "rows.gif").n_frames >= 4  # type: ignore[attr-defined]
    plain = pipe.text_to_image("a red apple", n=2, **QUIET)
    assert torch.equal(plain.tensor, images.tensor) and plain.steps is None


# Replaying


def test_images_are_made_again_from_their_file(tmp_path: Path) -> None:
    register_tiny()
    folder = ldm.save(tiny_dalle(), tmp_path / "model")
    pipe = ldm.load(weights=folder, device="cpu", dtype="float32")
    images = pipe.text_to_image("a red apple", n=2, temperature=0.7, top_k=20, top_p=0.9, **QUIET)
    (path,) = images.save(tmp_path / "apples.png")
    again = replay(read_recipe(path), weights=folder)
    assert torch.equal(again.tensor, images.tensor)
    Image.fromarray(images.numpy()[0]).save(tmp_path / "given.png")
    changed = pipe.variations(tmp_path / "given.png", n=1, prompt="a cat", strength=0.5, **QUIET)
    assert changed.recipe["replayable"]
    assert torch.equal(replay(changed.recipe, weights=folder).tensor, changed.tensor)


def test_a_recipe_of_too_much_work_is_refused(pipe: DalleMini) -> None:
    register_tiny()
    recipe = dict(pipe.text_to_image("a", n=1, **QUIET).recipe)
    with pytest.raises(ValueError, match="n: images"):
        replay({**recipe, "n": 1000}, weights="random")


# Known tokens


def test_known_tokens_are_kept_and_read(pipe: DalleMini) -> None:
    free = drawn(pipe, "a red apple", n=1, seed=2)
    known = free.clone()
    known[:, 5:9] = ABSENT
    assert torch.equal(drawn(pipe, "a red apple", known, n=1, seed=2)[:, :9], free[:, :9])
    assert torch.equal(drawn(pipe, "a red apple", known, n=1, seed=2), free)
    other = known.clone()
    other[:, 0] = (other[:, 0] + 1) % 64
    again = drawn(pipe, "a red apple", other, n=1, seed=2)
    kept = other != ABSENT
    assert torch.equal(again[kept], other[kept]) and not torch.equal(again[:, 5:9], free[:, 5:9])


def test_all_tokens_may_be_known(pipe: DalleMini) -> None:
    known = torch.arange(16)[None]
    assert torch.equal(drawn(pipe, "a", known, n=1), known)


def test_inpainting_keeps_every_other_pixel(pipe: DalleMini) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 8:30] = 1
    images = pipe.inpaint("a red apple", image, mask, n=2, guidance=1.0, **QUIET)
    inside = mask[0, 0] > 0
    assert torch.equal(images.tensor[..., ~inside], image.expand(2, -1, -1, -1)[..., ~inside])
    assert not torch.equal(images.tensor[0][:, inside], images.tensor[1][:, inside])
    assert images.recipe["task"] == "inpaint" and images.recipe["seam"] == 8.0
    hidden = image.clone()
    hidden[..., 20:40, 8:30] = 0
    assert torch.equal(
        pipe.inpaint("a red apple", hidden, mask, n=2, guidance=1.0, **QUIET).tensor, images.tensor
    )


@pytest.mark.parametrize(
    ("side", "count", "message"), [(32, 1, "expected 64×64 pixels"), (64, 3, "3 images for 2 to be made")]
)
def test_images_that_do_not_fit_are_refused(side: int, count: int, message: str, pipe: DalleMini) -> None:
    image = torch.rand(count, 3, side, side)
    with pytest.raises(ValueError, match=message):
        pipe.inpaint("a", image, torch.ones(1, 1, side, side), n=2, **QUIET)


def test_variations_keep_the_first_rows(pipe: DalleMini) -> None:
    image = pipe.text_to_image("a red apple", n=1, **QUIET).tensor
    given = pipe.images.encode(image)
    seen: list[Tensor] = []
    images = pipe.variations(
        image, n=2, strength=0.5, on_step=lambda count, tokens, _: seen.append(tokens), **QUIET
    )
    assert len(images) == 2 and images.recipe["strength"] == 0.5
    assert torch.equal(seen[-1].view(2, 4, 4)[:, :2], given[:, :2].expand(2, -1, -1))
    assert len(seen) == 8 and not torch.equal(seen[-1][0], seen[-1][1])
    with pytest.raises(ValueError, match="strength"):
        pipe.variations(image, strength=2.0, **QUIET)


def test_a_detokenizer_reads_no_images() -> None:
    pipe = tiny_dalle()
    vae = randomise(build_network(DetokenizerConfig(**vars(pipe.vae.config))))
    assert isinstance(vae, Detokenizer)
    pipe.vae = vae
    assert pipe.text_to_image("a", n=1, **QUIET).tensor.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="has no encoder"):
        pipe.variations(torch.rand(1, 3, 64, 64), **QUIET)


# Other parts


def test_ranking_by_clip(pipe: DalleMini) -> None:
    with pytest.raises(ValueError, match="pass clip"):
        pipe.rerank("a red apple", of=2, keep=1, **QUIET)
    clip = tiny_karlo().clip
    images = pipe.rerank("a red apple", clip=clip, of=4, keep=2, seed=3, **QUIET)
    scores = images.recipe["reranked"]["scores"]
    assert len(images) == 2 and scores[0] >= scores[1] and set(images.seeds) <= {3, 4, 5, 6}
    with pytest.raises(ValueError, match="keep"):
        pipe.rerank("a", clip=clip, of=2, keep=3, **QUIET)


def test_the_safety_checker_sees_the_images() -> None:
    class Flags(SafetyChecker):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.black, self.origin = True, {}

        def forward(self, pixels: Tensor) -> tuple[bool, ...]:
            return tuple(i == 0 for i in range(len(pixels)))

    pipe = tiny_dalle()
    pipe.safety = Flags()
    images = pipe.text_to_image("a cat", n=2, **QUIET)
    assert images.flagged == (True, False) and not images.tensor[0].any() and images.tensor[1].any()
    assert not images.recipe["replayable"]


def test_images_of_a_signed_autoencoder() -> None:
    plain, signed = tiny_dalle(), tiny_dalle(signed=True)
    tokens = torch.arange(16).view(1, 4, 4)
    with torch.no_grad():
        raw = plain.vae.decode_indices(tokens)
        assert torch.allclose(plain.images.decode(tokens), raw.clamp(0, 1))
        assert torch.allclose(signed.images.decode(tokens), (raw / 2 + 0.5).clamp(0, 1))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        same = plain.images.encode(2 * x.clamp(0, 0.5))
        assert torch.equal(signed.images.encode(x.clamp(0, 0.5) + 0.5), same)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": replace(DECODER, length=9)}, "9 tokens, expected those of 64×64"),
        ({"decoder": replace(DECODER, vocabulary=32)}, "knows 32 tokens"),
        ({"decoder": replace(DECODER, width=64)}, "32 wide, the decoder 64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    assert CARD.networks is not None
    networks = DalleNetworks(**{**vars(CARD.networks), **changes})
    with pytest.raises(ValueError, match=message):
        tiny_dalle(networks=networks)


def test_defaults_of_the_card() -> None:
    pipe = tiny_dalle(sampling=TokenDefaults(guidance=3, temperature=0, top_k=5, top_p=0.5), pictures=2)
    images = pipe.text_to_image("a cat", **QUIET)
    assert len(images) == 2 and images.recipe["temperature"] == 0 and images.recipe["top_k"] == 5
    assert torch.equal(images.tensor[0], images.tensor[1])  # the most probable tokens
    with pytest.raises(ValueError, match="top_p"):
        TokenDefaults(top_p=0.0)


def test_greedy_tokens_equal_min_dalle() -> None:
    min_dalle_models()
    pipe = tiny_dalle()
    ids, _ = pipe.tokenizer(["", "a red apple"], 12)
    theirs = peer_networks(pipe.encoder, pipe.decoder)
    tokens, _ = peer_tokens(*theirs, ids, start=64, length=16)
    assert torch.equal(drawn(pipe, "a red apple", n=1, temperature=0.0), tokens)
