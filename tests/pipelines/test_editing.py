"""Test variations, interpolation, inversion, editing and tiled upscaling where the results are known."""

from __future__ import annotations

from typing import Any

import pytest
import reduced_families
import torch
from tiny_latent_diffusion import tiny_model
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.models.layers.attention import attention_control
from ldm.pipelines.conditions import between_conditions
from ldm.pipelines.prompt_to_prompt import align

OPTIONS: dict[str, Any] = {"progress": False, "steps": 4, "sampler": "ddim"}
OWN: dict[str, Any] = {"progress": False, "steps": 4}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reduced_families.load(reduced_families.register("sd-v1-5", tmp_path_factory.mktemp("cards")).name)


def random_image(h: int = 32, w: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(seed))


def near(a: Tensor, b: Tensor, atol: float = 1e-4) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=atol)


def test_variations_are_image_to_image(pipe: Any, published: Any) -> None:
    image = random_image()
    made = published.variations(image, prompt="a cat", strength=0.5, **OPTIONS)
    assert len(made) == 4 and made.seeds == (0, 1, 2, 3)
    assert torch.equal(
        made.tensor, published.image_to_image("a cat", image, strength=0.5, n=4, **OPTIONS).tensor
    )
    assert torch.equal(
        pipe.variations(image, prompt="cat", **OPTIONS).tensor,
        pipe.image_to_image("cat", image, strength=0.6, n=4, **OPTIONS).tensor,
    )
    itself, of_nothing = (
        pipe.variations(image, n=1, **OPTIONS),
        pipe.image_to_image("", image, strength=0.6, **OPTIONS),
    )
    # without a prompt, the draft is the latent of the image
    assert not near(itself.tensor, of_nothing.tensor, 1e-3)
    assert pipe.variations(image, strength=0, n=2, **OPTIONS).tensor.shape[0] == 2


@pytest.mark.parametrize("name", ["pipe", "published"])
def test_interpolation_of_prompts_starts_and_ends_at_them(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    a, b = "red apple on blue", "cat"
    made = model.interpolate(a, b, n=5, seed=3, **OPTIONS)
    ends = [model.text_to_image(prompt, seed=3, **OPTIONS).tensor for prompt in (a, b)]
    assert near(made.tensor[:1], ends[0]) and near(made.tensor[-1:], ends[1])
    assert (
        made.seeds == (3,) * 5
        and made.prompts[0] == a
        and made.prompts[-1] == b
        and "0.50" in made.prompts[2]
    )
    steps = (made.tensor[1:] - made.tensor[:-1]).flatten(1).norm(dim=1)
    assert float(steps.max()) < float((ends[0] - ends[1]).norm()) + 1e-3


def test_interpolation_of_seeds_starts_and_ends_at_them(pipe: Any) -> None:
    made = pipe.interpolate(4, 9, prompt="cat", n=3, **OPTIONS)
    for index, seed in ((0, 4), (2, 9)):
        assert near(made.tensor[index : index + 1], pipe.text_to_image("cat", seed=seed, **OPTIONS).tensor)
    assert made.recipe["seed"] == [4, 9]


@pytest.mark.parametrize("prompt", ["cat", ""])
def test_interpolation_of_images_starts_and_ends_at_them(pipe: Any, prompt: str) -> None:
    a, b = random_image(), random_image(seed=1)
    made = pipe.interpolate(a[0], b[0], n=3, prompt=prompt, seed=2, **OWN)
    for index, image in ((0, a), (2, b)):
        assert near(made.tensor[index : index + 1], pipe.decode(pipe.encode(image)), 2e-3)
    assert made.seeds == (2, 2, 2) and not near(made.tensor[1:2], made.tensor[:1], 1e-2)


def test_interpolated_conditions() -> None:
    a = Cond(
        context=torch.tensor([[[1.0], [2.0], [7.0]]]),
        context_mask=torch.tensor([[True, True, False]]),
        pooled=torch.zeros(1, 2),
    )
    b = Cond(
        context=torch.tensor([[[3.0], [4.0], [5.0]]]),
        context_mask=torch.ones(1, 3, dtype=torch.bool),
        pooled=torch.ones(1, 2),
    )
    got = between_conditions(a, b, torch.tensor([0.0, 0.5, 1.0]))
    assert got.context is not None and got.context_mask is not None and got.pooled is not None
    # the last token of a is repeated
    assert got.context[:, :, 0].tolist() == [
        [1, 2, 2],
        [2, 3, 3.5],
        [3, 4, 5],
    ]
    assert got.context_mask.tolist() == [[True, True, False], [True, True, True], [True, True, True]]
    assert got.pooled[:, 0].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("name", ["pipe", "published"])
def test_exact_inversion_gives_the_decoded_image(name: str, request: pytest.FixtureRequest) -> None:
    model, image = request.getfixturevalue(name), torch.cat([random_image(), random_image(seed=1)])
    known = model.decode(model.encode(image))
    made = model.reconstruct(image, prompt="cat", **{**OWN, "steps": 10})
    assert (
        near(made.tensor, known, 2e-3) and made.recipe["guidance"] == 1 and made.recipe["sampler"] == "ddim"
    )
    near_by = [
        float(
            (model.reconstruct(image, exact=False, iterations=k, **{**OWN, "steps": 10}).tensor - known)
            .abs()
            .max()
        )
        for k in (1, 20)
    ]
    assert near_by[1] <= near_by[0]


def test_an_edit_to_the_same_prompt_gives_the_image(pipe: Any) -> None:
    image, known = random_image(), pipe.decode(pipe.encode(random_image()))
    same = pipe.edit("cat", "cat", image=image, guidance=1.0, **OWN)
    assert near(same.tensor, known, 2e-3)
    other = pipe.edit("cat", "red apple", image=image, **OWN)
    assert (
        not near(other.tensor, known, 1e-2)
        and other.recipe["source"] == "cat"
        and other.recipe["prompt"] == "red apple"
    )
    less = pipe.edit("cat", "red apple", image=image, strength=0.3, **OWN)
    assert float((less.tensor - known).abs().mean()) < float((other.tensor - known).abs().mean())
    led = pipe.edit("cat", "cat", image=image, cross=1.0, within=1.0, guidance=1.0, **OWN)
    assert near(led.tensor, known, 5e-3)  # attention with control rounds differently
    assert (
        pipe.edit(
            "cat", "red apple", image=torch.cat([image, random_image(seed=1)]), exact=False, n=1, **OWN
        ).tensor.shape[0]
        == 2
    )


@pytest.mark.parametrize("name", ["pipe", "published"])
def test_attention_is_taken_from_the_source(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    source, target = (model.text_to_image(p, n=2, **OPTIONS).tensor for p in ("red apple", "red cat"))
    assert near(model.edit("red apple", "red cat", n=2, cross=0.0, within=0.0, **OPTIONS).tensor, target)
    assert near(model.edit("red apple", "red apple", n=2, cross=1.0, within=1.0, **OPTIONS).tensor, source)
    turned = model.text_to_image("red cat", n=2, negative=["apple", "blue"], **OPTIONS)
    assert near(
        model.edit(
            "red apple", "red cat", n=2, cross=0.0, within=0.0, negative=["apple", "blue"], **OPTIONS
        ).tensor,
        turned.tensor,
    )
    led = model.edit("red apple", "red cat", n=2, cross=1.0, within=1.0, **OPTIONS)
    assert not near(led.tensor, target, 1e-6) and led.seeds == (0, 1) and led.prompts == ("red cat",) * 2
    assert all(part.controls == () for part in model.denoiser.net.modules() if hasattr(part, "controls"))
    assert not near(
        model.edit("red cat", "red cat", emphasis={"cat": 4.0}, **OPTIONS).tensor, target[:1], 1e-6
    )


def test_shared_words_have_the_maps_of_the_source(published: Any) -> None:
    seen: list[Tensor] = []
    with attention_control(
        published.denoiser.net, lambda name, p: seen.append(p)
    ):  # registered first, so it sees the maps before they are replaced
        published.edit("a red apple", "a red cat", cross=1.0, within=0.0, **{**OPTIONS, "steps": 1})
    alignment = align(published.text.places("a red apple"), published.text.places("a red cat"), 77, {})
    # one word replaces one word: all maps come from the source
    assert torch.equal(alignment.taken, torch.eye(77)) and bool(alignment.shared.all())


def test_alignments() -> None:
    source, prompt = [("red", [1]), ("apple", [2, 3])], [("a", [1]), ("red", [2]), ("cat", [3])]
    alignment = align(source, prompt, 6, {"red": 2.5})
    # the start, red, cat in place of apple, the end; "a" has no counterpart
    assert alignment.shared.tolist() == [
        1,
        0,
        1,
        1,
        1,
        1,
    ]
    assert alignment.taken[:, 2].tolist() == [0, 1, 0, 0, 0, 0] and alignment.taken[:, 3].tolist() == [
        0,
        0,
        0.5,
        0.5,
        0,
        0,
    ]
    assert alignment.taken[:, 4].tolist() == [0, 0, 0, 0, 1, 0] and alignment.scale.tolist() == [
        1,
        1,
        2.5,
        1,
        1,
        1,
    ]
    with pytest.raises(ValueError, match="no word 'dog'"):
        align(source, prompt, 6, {"dog": 2.0})


def test_tiled_upscaling(pipe: Any, published: Any) -> None:
    image = random_image(24, 16)
    big = pipe.upscale(image, "cat", factor=2, **OPTIONS)
    assert big.tensor.shape == (1, 3, 48, 32) and big.recipe["factor"] == 2 and big.recipe["window"] == 32
    large = torch.nn.functional.interpolate(image, (48, 32), mode="bicubic", antialias=True).clamp(0, 1)
    kept = published.upscale(image, factor=2, strength=0, **OPTIONS).tensor
    assert torch.equal(kept, published.decode(published.encode(large)))
    assert published.upscale(image, "a cat", factor=3, **OPTIONS).tensor.shape == (1, 3, 72, 48)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.variations(random_image(), strength=2), "strength: expected 0 to 1, got 2"),
        (lambda p: p.variations(random_image(), n=0), "n: expected"),
        (lambda p: p.interpolate("cat", 3), "two texts, two seeds, or two images, got str and int"),
        (lambda p: p.interpolate("cat", "apple", n=1), "n: expected at least 2 images"),
        (lambda p: p.interpolate(random_image(), random_image(16)), "two images of one size"),
        (lambda p: p.reconstruct(random_image(), sampler="ddpm"), "inversion runs ddim"),
        (
            lambda p: p.edit("cat", "apple", image=random_image(), strength=0),
            "strength: expected more than 0",
        ),
        (
            lambda p: p.edit("cat", "apple", image=random_image(), strength=2),
            "strength: expected 0 to 1, got 2",
        ),
        (lambda p: p.edit("cat", "apple", cross=1.5), "cross: expected 0 to 1"),
        (lambda p: p.edit("cat", "apple", emphasis={"dog": 2}), "no word 'dog'"),
        (lambda p: p.edit("cat", ["apple", "cat"]), "prompt: expected a text, got"),
        (
            lambda p: p.upscale(random_image(), factor=1),
            "factor: expected a whole number of at least 2, got 1",
        ),
        (lambda p: p.upscale(random_image(), factor=1.5), "factor: expected"),
        (lambda p: p.reconstruct("absent.png"), "absent.png"),
    ],
)
def test_wrong_input_is_refused(pipe: Any, call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        call(pipe)
