"""Models with exemplars through the tasks of the pipeline, saving, loading and recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_exemplars import SIZE, tiny_exemplar_model, tiny_exemplar_unclip

import ldm
from ldm.models.layout import multiplied
from ldm.pipelines.checks import UnknownWords
from ldm.support.config import read_yaml


@pytest.fixture(scope="module")
def pipe():
    return tiny_exemplar_model()


def draw(pipe, prompt: str = "a red cat and a dog", **options) -> torch.Tensor:
    return pipe.text_to_image(prompt, progress=False, **options).tensor


def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_batch(pipe):
    together = draw(pipe, n=3, seed=4)
    assert together.shape == (3, 3, SIZE, SIZE)
    for i in range(3):
        assert torch.allclose(draw(pipe, seed=4 + i)[0], together[i], atol=1e-5)
    two = draw(pipe, ["a cat", "a dog to the left of a cat"], seed=[4, 9])
    assert torch.allclose(draw(pipe, "a dog to the left of a cat", seed=9)[0], two[1], atol=1e-5)
    assert not torch.allclose(draw(pipe, "a cat", seed=4), draw(pipe, "a dog", seed=4), atol=1e-3)


def test_the_seed_draws_the_layout_for_the_same_noise(pipe):
    noise = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    images = [draw(pipe, "a fluent cat", latents=noise, seed=seed) for seed in (0, 1, 2, 1)]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 3
    assert torch.equal(images[1], images[3])


def test_negative_prompts_may_name_things(pipe):
    both = draw(pipe, "a cat", negative="a dog", n=2, seed=1)
    assert torch.allclose(draw(pipe, "a cat", negative="a dog", seed=2)[0], both[1], atol=1e-5)
    assert not torch.allclose(both[:1], draw(pipe, "a cat", seed=1), atol=1e-4)


def test_tasks_on_images(pipe):
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    options = {"progress": False, "seed": 3}
    assert pipe.image_to_image("a cat", image, strength=0.6, **options).tensor.shape == image.shape
    painted = pipe.inpaint("a dog", image, mask, **options).tensor
    assert torch.allclose(painted[..., SIZE // 2 :], image[..., SIZE // 2 :], atol=1e-6)
    assert pipe.outpaint("a dog", image, right=8, **options).tensor.shape[-1] == SIZE + 8
    assert pipe.variations(image, **options).tensor.shape[1:] == image.shape[1:]
    assert len(pipe.interpolate("a cat", "a blue dog", n=3, **options)) == 3
    assert pipe.edit("a red cat", "a blue cat", progress=False, seed=3).tensor.shape[1:] == image.shape[1:]


def test_attention_maps_are_those_of_the_slot_words(pipe):
    with ldm.trace(pipe) as traced:
        draw(pipe, "a red cat and a dog")
    assert traced.words() == ["a", "red", "cat", "and", "a", "dog"]
    assert traced.levels() == [(2, 2)]
    cat = traced.attention("cat")
    assert cat.shape == (1, 4, 4) and 0 < float(cat.mean()) < 1


def test_words_outside_the_library_are_warned_of(pipe):
    with pytest.warns(UnknownWords, match="never seen 'zeppelin': the image"):
        draw(pipe, "a zeppelin and a cat")
    with pytest.warns(UnknownWords, match=r"never seen 'catt' \(did you mean 'cats?'\?\): the image"):
        draw(pipe, "a catt on blue")
    with pytest.warns(
        UnknownWords, match="^tiny-exemplars cannot draw so many things at once: it leaves out 'cat'$"
    ):
        draw(pipe, "a cat, a dog and a cat")


def test_an_image_of_ones_own_is_drawn_without_training(tmp_path: Path):
    pipe = tiny_exemplar_model()
    levels = np.random.default_rng(0).integers(0, 256, (40, 32, 4), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "robot.png")
    before = draw(pipe, "a cat", seed=1)
    pipe.exemplars.add("my robot", tmp_path / "robot.png")
    assert "my robot" in pipe.exemplars.nouns and torch.equal(draw(pipe, "a cat", seed=1), before)
    shown = draw(pipe, "my robot on a blue background", seed=1)
    pipe.exemplars.remove("my robot")
    with pytest.warns(UnknownWords, match="robot"):
        assert not torch.allclose(draw(pipe, "my robot on a blue background", seed=1), shown, atol=1e-4)


def test_the_exemplars_that_a_seed_chooses_are_stated(pipe):
    prompt = "a cat and an apple"
    found = {tuple(pipe.exemplars.chosen(prompt, seed)) for seed in range(8)}
    assert len(found) > 1
    for seed in range(4):
        things = pipe.text.draw_things([pipe.text.read(prompt)], [seed])[0].images
        of = {(exemplar.name, exemplar.style): exemplar for exemplar in pipe.exemplars.library}
        for slot, chosen in enumerate(pipe.exemplars.chosen(prompt, seed)):
            assert torch.equal(things[0, slot], multiplied(pipe.exemplars.library.pixels(of[chosen])))
    assert pipe.exemplars.chosen("a blue") == []


def test_an_embedding_chooses_in_an_unclip_model():
    with pytest.raises(ValueError, match="the embedding of an image chooses"):
        tiny_exemplar_unclip().exemplars.chosen("a cat")


def test_saved_models_are_loaded_with_their_library(tmp_path: Path):
    pipe = tiny_exemplar_model()
    pipe.exemplars.add("robot", torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(7)))
    ldm.save(pipe, tmp_path / "model", dtype=None)
    again = ldm.load(weights=tmp_path / "model", dtype="float32")
    assert torch.equal(draw(again, "robot and a cat"), draw(pipe, "robot and a cat"))
    (tmp_path / "model" / "library.json").write_text(
        '{"size": 16, "images": [], "nouns": {}}', encoding="utf-8"
    )
    with pytest.raises(ValueError, match="library.json"):
        ldm.load(weights=tmp_path / "model")


def test_parts_may_lie_in_another_models_folder(tmp_path: Path):
    """Networks, vocabulary and library are read there, and a saved copy holds them."""
    pipe = tiny_exemplar_model()
    ldm.save(pipe, tmp_path / "whole", dtype=None)
    mapping = read_yaml(tmp_path / "whole" / "card.yaml")
    mapping |= {"name": "shared", "parts": dict.fromkeys(("unet", "vae", "text", "layout"), "../whole")}
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "card.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    shared = ldm.load(weights=tmp_path / "shared", dtype="float32")
    assert shared.name == "shared" and torch.equal(draw(shared), draw(pipe))
    ldm.save(shared, tmp_path / "copy", dtype=None)
    copy = ldm.load(weights=tmp_path / "copy", dtype="float32")
    assert copy.card.parts == {} and torch.equal(draw(copy), draw(shared))
    (tmp_path / "whole" / "library.json").unlink()
    with pytest.raises(FileNotFoundError, match="library.json"):
        ldm.load(weights=tmp_path / "shared")


def test_models_without_exemplars_say_so():
    from tiny_latent_diffusion import tiny_model

    with pytest.raises(ValueError, match="has no exemplars"):
        tiny_model().exemplars.add("robot", torch.rand(3, 16, 16))
