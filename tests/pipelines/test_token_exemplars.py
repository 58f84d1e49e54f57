"""`DalleMini` with exemplars: what is shown is drawn, seeds, libraries, recipes, tasks on known tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_dalle import tiny_dalle, tiny_token_exemplars
from tiny_exemplars import SIZE
from torch import Tensor

import ldm
from ldm.images.files import read_recipe
from ldm.pipelines.checks import UnknownWords
from ldm.pipelines.dalle.pipeline import DalleMini
from ldm.pipelines.dalle.token_images import ABSENT
from ldm.registry.replaying import replay
from ldm.support.config import read_yaml

QUIET: dict[str, Any] = {"progress": False}
GREEDY: dict[str, Any] = {**QUIET, "temperature": 0.0}


@pytest.fixture(scope="module")
def pipe() -> DalleMini:
    return tiny_token_exemplars()


def draw(pipe: DalleMini, prompt: str | list[str] = "a red cat and a dog", **options: Any) -> Tensor:
    return pipe.text_to_image(prompt, **{"n": 1, **QUIET, **options}).tensor


def shown_latents(pipe: DalleMini, prompt: str, seed: int) -> Tensor:
    """Return the latents (C, h, w) of the canvas of a prompt on white."""
    assert pipe.text is not None
    canvas = pipe.text([prompt], seeds=[seed]).exemplars
    assert canvas is not None
    canvas = canvas.sum(1)  # (1, 4, H, W)
    return pipe.vae.encode(2 * (canvas[:, :3] + 1 - canvas[:, 3:]) - 1).mode()[0]


def error(pipe: DalleMini, tokens: Tensor, latents: Tensor) -> Tensor:
    """Return the squared distance of the codes of tokens (N,) from latents (C, h, w) in each cell, (h, w)."""
    codes = pipe.vae.quantize.vectors(tokens.view(1, *latents.shape[1:]))[0]
    return (codes - latents).square().sum(0)


@torch.no_grad()
def test_what_is_shown_is_drawn(pipe: DalleMini) -> None:
    for prompt, seed in (("a fluent cat", 3), ("a dog to the left of a cat", 4)):
        call = pipe.settle(prompt, n=1, seed=seed, **GREEDY)
        tokens, latents = list(pipe.drawn(call))[-1][1], shown_latents(pipe, prompt, seed)
        least = error(pipe, pipe.vae.indices(latents[None]), latents).mean()
        other = error(pipe, tokens.roll(5), latents).mean()
        assert error(pipe, tokens, latents).mean() < least + 0.2 * (other - least)


def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_batch(pipe: DalleMini) -> None:
    together = draw(pipe, n=3, seed=4)
    assert together.shape == (3, 3, SIZE, SIZE)
    for i in range(3):
        assert torch.allclose(draw(pipe, seed=4 + i)[0], together[i], atol=1e-5)
    two = draw(pipe, ["a cat", "a dog to the left of a cat"], seed=[4, 9])
    assert torch.allclose(draw(pipe, "a dog to the left of a cat", seed=9)[0], two[1], atol=1e-5)
    greedy = {"temperature": 0.0}
    one, other = (draw(pipe, "a cat", seed=seed, **greedy) for seed in (1, 2))
    assert not torch.equal(one, other)  # the layout and the exemplar are the seed's


def test_guidance_has_an_empty_canvas_in_its_other_branch(pipe: DalleMini) -> None:
    guided = draw(pipe, "a cat", n=2, seed=1, guidance=2.0)
    assert torch.allclose(draw(pipe, "a cat", seed=2, guidance=2.0)[0], guided[1], atol=1e-5)
    assert torch.equal(draw(pipe, "a cat", guidance=0.0), draw(pipe, "a dog", guidance=0.0))
    near = draw(pipe, "a cat", seed=1, guidance=1.0 + 1e-6)
    assert torch.equal(near, draw(pipe, "a cat", seed=1))
    named = draw(pipe, "a cat", seed=1, guidance=2.0, negative="a dog")
    assert named.shape == near.shape


def test_words_outside_the_library_are_warned_of(pipe: DalleMini) -> None:
    with pytest.warns(UnknownWords, match="never seen 'zeppelin': the image"):
        draw(pipe, "a zeppelin and a cat")


def test_an_image_of_ones_own_is_drawn_without_training(tmp_path: Path) -> None:
    pipe = tiny_token_exemplars()
    image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    before = draw(pipe, "a cat", seed=1)
    pipe.exemplars.add("my robot", image)
    assert torch.equal(draw(pipe, "a cat", seed=1), before)
    made = pipe.text_to_image("my robot", n=1, seed=1, **GREEDY)
    assert made.recipe["weights"]["exemplars added"]
    ldm.save(pipe, tmp_path / "model")
    again = ldm.load(weights=tmp_path / "model", device="cpu", dtype="float32")
    assert torch.equal(again.text_to_image("my robot", n=1, seed=1, **GREEDY).tensor, made.tensor)
    pipe.exemplars.remove("my robot")
    with pytest.warns(UnknownWords, match="robot"):
        assert not torch.equal(pipe.text_to_image("my robot", n=1, seed=1, **GREEDY).tensor, made.tensor)
    with pytest.raises(ValueError, match="'tiny-dalle' has no exemplars"):
        _ = tiny_dalle().exemplars


def test_parts_may_lie_in_another_models_folder_and_images_are_made_again(tmp_path: Path) -> None:
    ldm.save(tiny_token_exemplars(), tmp_path / "whole")
    mapping = read_yaml(tmp_path / "whole" / "card.yaml")
    parts = ("text", "layout", "encoder", "decoder", "vae")
    mapping |= {"name": "shared", "parts": dict.fromkeys(parts, "../whole")}
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "card.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    shared = ldm.load(weights=tmp_path / "shared", device="cpu", dtype="float32")
    images = shared.text_to_image("a cat and a dog", n=1, **QUIET)
    (path,) = images.save(tmp_path / "cats.png")
    recipe = read_recipe(path)
    assert {*parts, "library.json", "library.safetensors", "vocabulary.json"} <= recipe["weights"].keys()
    assert torch.equal(replay(recipe, weights=tmp_path / "shared").tensor, images.tensor)


def test_a_folder_without_the_prior_is_refused(tmp_path: Path) -> None:
    folder = ldm.save(tiny_token_exemplars(), tmp_path / "model")
    (folder / "layout.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="layout"):
        ldm.load(weights=folder)


@torch.no_grad()
def test_known_tokens_are_continued_in_the_layout_that_fits_them(pipe: DalleMini) -> None:
    prompt, hidden = "a fluent cat", 11
    latents = shown_latents(pipe, prompt, hidden)
    known = pipe.vae.indices(latents[None])  # (1, h, w)
    known[:, 2:] = ABSENT
    own, fitted = [], []
    for seed in range(4):
        call = pipe.settle(prompt, n=1, seed=seed, **GREEDY)
        for errors, given in ((own, None), (fitted, known.flatten(1))):
            tokens = list(pipe.drawn(call, given))[-1][1]
            errors.append(error(pipe, tokens, latents)[2:].mean())
    assert sum(fitted) < 0.7 * sum(own)


def test_tasks_on_images(pipe: DalleMini) -> None:
    image = draw(pipe, "a cat", seed=5)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :, :] = 1
    painted = pipe.inpaint("a dog", image, mask, n=2, **QUIET).tensor
    assert torch.equal(painted[..., : SIZE // 2, :], image[..., : SIZE // 2, :].expand(2, -1, -1, -1))
    changed = pipe.variations(image, n=2, strength=0.5, **GREEDY)
    with torch.no_grad():
        tokens, given = pipe.images.encode(changed.tensor), pipe.images.encode(image)
    assert changed.tensor.shape == (2, 3, SIZE, SIZE)
    assert (tokens == given).float().mean() > 0.5  # the image itself is shown
    assert pipe.variations(image, n=1, prompt="a cat", **QUIET).tensor.shape == image.shape
