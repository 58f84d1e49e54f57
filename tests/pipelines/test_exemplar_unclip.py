"""unCLIP with exemplars: an embedding chooses what the prompt leaves open, and the model is saved whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_exemplars import NAMES, SIZE, STYLES, tiny_exemplar_unclip

import ldm
from ldm.conditioning.exemplar_index import ExemplarIndex, SceneMetric, on_white
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.pipelines.checks import UnknownWords
from ldm.pipelines.protocol import Known, Request
from ldm.pipelines.unclip import UnCLIP


@pytest.fixture(scope="module")
def shared_pipe() -> UnCLIP:
    return tiny_exemplar_unclip()


@pytest.fixture
def pipe() -> UnCLIP:
    return tiny_exemplar_unclip()


def embedding_of(pipe: UnCLIP, name: str, style: str) -> ImageEmbedding:
    """Return the embedding of an exemplar on white."""
    library = pipe.decoder.text.library
    exemplar = next(e for e in library if (e.name, e.style) == (name, style))
    return pipe.clip.image_embedding(on_white(library.pixels(exemplar)[None], SIZE))


def shown(pipe: UnCLIP, prompt: str, embedding: ImageEmbedding, seed: int = 3) -> torch.Tensor:
    """Return the exemplars (K, 4, H, W) that the decoder is shown."""
    call = pipe.settle(prompt, n=1, seed=seed)
    cond, _ = pipe.conditions_of(call, embedding)
    return cond.exemplars[0]


def test_the_index_finds_every_exemplar_by_its_own_embedding(pipe):
    text = pipe.decoder.text
    vectors = text.index.vectors()
    assert vectors.shape == (len(text.library), pipe.clip.width)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-5)
    for exemplar, vector in zip(text.library, vectors, strict=True):
        assert text.index.nearest(vector) is exemplar
        assert text.index.nearest(-vector) is not exemplar
    again = ExemplarIndex(text.library, pipe.clip, vectors.half())
    assert torch.allclose(again.vectors(), vectors, atol=2e-3)
    with pytest.raises(ValueError, match=r"expected \(9, 24\), a row for each exemplar"):
        ExemplarIndex(text.library, pipe.clip, vectors[1:])


def test_a_metric_finds_things_in_scenes_that_change_their_embedding(pipe):
    library, g = pipe.decoder.text.library, torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(len(library), pipe.clip.width, generator=g), dim=-1)
    scene = torch.randn(2, pipe.clip.width, generator=g)  # two directions in which backgrounds change it

    def seen(rows: torch.Tensor) -> torch.Tensor:
        changed = vectors[rows] + torch.randn(len(rows), 2, generator=g) @ scene + 0.3
        return torch.nn.functional.normalize(changed, dim=-1)

    rows = torch.randint(len(library), (2000,), generator=g)
    metric = SceneMetric.fit(vectors, seen(rows) - vectors[rows])
    plain, fitted = (ExemplarIndex(library, pipe.clip, vectors, m) for m in (None, metric))
    wanted = torch.arange(len(library)).repeat(20)
    found = [
        [exemplar is list(library)[row] for exemplar, row in pairs]
        for pairs in (
            [(index.nearest(vector), int(row)) for vector, row in zip(seen(wanted), wanted, strict=True)]
            for index in (plain, fitted)
        )
    ]
    right = [sum(each) / len(each) for each in found]
    assert right[0] < 0.5 and right[1] > 0.9, right


@pytest.mark.parametrize("style", STYLES)
def test_an_embedding_chooses_the_style_that_a_prompt_leaves_open(shared_pipe, style):
    embedding = embedding_of(shared_pipe, "dog", style)
    asked = shown(shared_pipe, f"a {style} dog", embedding_of(shared_pipe, "cat", "noto"))
    assert torch.equal(shown(shared_pipe, "a dog", embedding), asked) and asked.any()


@pytest.mark.parametrize("name", NAMES)
def test_an_embedding_alone_shows_the_thing_that_is_nearest(shared_pipe, name):
    embedding = embedding_of(shared_pipe, name, "flat")
    phrase = name.replace("-", " ")
    assert torch.equal(shown(shared_pipe, "", embedding), shown(shared_pipe, f"flat {phrase}", embedding))
    on_blue = shown(shared_pipe, "on blue background", embedding)
    assert torch.equal(on_blue, shown(shared_pipe, f"{phrase} on blue background", embedding))


def test_seeds_draw_layouts_and_images_do_not_depend_on_their_batch(shared_pipe):
    embedding = embedding_of(shared_pipe, "cat", "noto")
    together = shared_pipe.text_to_image("a cat", n=3, embedding=embedding, progress=False).tensor
    assert together.shape == (3, 3, SIZE, SIZE) and not torch.equal(together[0], together[1])
    for seed in range(3):
        alone = shared_pipe.text_to_image("a cat", n=1, seed=seed, embedding=embedding, progress=False).tensor
        torch.testing.assert_close(alone[0], together[seed], atol=1e-5, rtol=0)


def test_texts_name_what_an_embedding_may_show(shared_pipe):
    embedding = embedding_of(shared_pipe, "dog", "noto")
    call = shared_pipe.settle("", n=1, seed=3)
    cond, _ = shared_pipe.conditions_of(call, embedding, named=["a cat", "on blue background"])
    wanted, _ = shared_pipe.conditions_of(shared_pipe.settle("cat", n=1, seed=3), embedding)
    assert torch.equal(cond.exemplars, wanted.exemplars)
    free, _ = shared_pipe.conditions_of(call, embedding, named=["on blue background"])
    assert torch.equal(free.exemplars[0], shown(shared_pipe, "dog", embedding))


def test_an_inverted_image_is_shown_as_it_is(shared_pipe):
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    call = shared_pipe.settle("", n=2)
    embedding = shared_pipe.clip.image_embedding(image)
    cond, _ = shared_pipe.conditions_of(call, embedding, image=image)
    assert torch.equal(cond.exemplars[:, 0, :3], image.expand(2, 3, SIZE, SIZE))
    prompted, _ = shared_pipe.conditions_of(shared_pipe.settle("a cat", n=2), embedding, image=image)
    assert torch.equal(prompted.exemplars[0], shown(shared_pipe, "a cat", embedding, seed=0))


def half_mask() -> torch.Tensor:
    """Return a mask of the left half."""
    return torch.arange(SIZE).lt(SIZE // 2).float().expand(1, 1, SIZE, SIZE)


def test_inpainting_places_exemplars_where_they_fit_the_image(shared_pipe):
    image = shared_pipe.text_to_image("a cat", n=1, seed=4, progress=False, upsample=False).tensor
    call = shared_pipe.settle("a cat", n=1, seed=9)
    pair = shared_pipe.conditions(call)
    latent = shared_pipe.stage.encode(image)
    hole = torch.zeros_like(latent[:1, :1])
    hole[..., : hole.shape[-1] // 2] = 1
    fitted, _ = shared_pipe._fitted(pair, call, Request(task="inpaint", known=Known(latent, hole)))
    assert torch.equal(fitted.image_emb, pair[0].image_emb)
    t = torch.tensor(500)
    noised = shared_pipe.decoder.denoiser.schedule.add_noise(latent, t.expand(1), torch.ones_like(latent))

    def error(cond) -> float:
        return float(
            ((shared_pipe.decoder.denoiser(noised, t, cond).x0 - latent).square() * (1 - hole)).mean()
        )

    assert error(fitted) < error(pair[0])
    whole = Request(task="text_to_image")
    assert shared_pipe._fitted(pair, call, whole) is pair


def test_all_tasks_run(shared_pipe):
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    quiet = {"progress": False, "steps": 2}
    made = [
        shared_pipe.text_to_image("three cats to the left of a dog", n=2, **quiet),
        shared_pipe.variations(image, n=2, **quiet),
        shared_pipe.variations(image, n=2, invert=True, eta=0.5, **quiet),
        shared_pipe.reconstruct(image, **quiet),
        shared_pipe.interpolate("a cat", "a dog", n=3, **quiet),
        shared_pipe.text_difference(image, "a cat", "a blue dog", n=2, **quiet),
        shared_pipe.inpaint("a cat", image, half_mask(), n=2, **quiet),
        shared_pipe.inpaint("", image, half_mask(), n=1, **quiet),
    ]
    for images in made:
        assert images.tensor.isfinite().all() and images.tensor.shape[1:] == (3, SIZE, SIZE)


def test_an_added_image_is_drawn_by_name_and_found_by_its_embedding(pipe):
    g = torch.Generator().manual_seed(5)
    robot = torch.cat([torch.rand(3, SIZE, SIZE, generator=g), torch.ones(1, SIZE, SIZE)])
    with pytest.warns(UnknownWords, match="robot"):
        pipe.settle("a robot", n=1)
    pipe.exemplars.add("robot", robot)
    pipe.settle("a robot", n=1)
    embedding = embedding_of(pipe, "robot", "own")
    assert pipe.decoder.text.index.nearest(embedding.vector[0]).name == "robot"
    assert torch.equal(shown(pipe, "", embedding), shown(pipe, "robot", embedding))
    assert "exemplars added" in pipe.origin


def test_a_saved_model_draws_the_same(pipe, tmp_path: Path):
    ldm.save(pipe, tmp_path / "model")
    again = ldm.load(weights=tmp_path / "model", device="cpu", dtype="float32")
    assert len(again.exemplars) == len(pipe.exemplars)
    options = {"n": 2, "progress": False}
    a, b = (model.text_to_image("a cat on blue background", **options).tensor for model in (pipe, again))
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)
    a, b = (model.decoder.text.index.vectors() for model in (pipe, again))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
