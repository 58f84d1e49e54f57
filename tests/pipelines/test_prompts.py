"""Test prompts through the pipeline: weights, long prompts, negative prompts, independence within a batch."""

from __future__ import annotations

import pytest
import torch
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.pipelines.checks import UnknownWords


@pytest.fixture(scope="module")
def pipe():
    return tiny_model()


def run(pipe, prompt="a red apple", **options):
    return pipe.text_to_image(prompt, progress=False, **{"steps": 2, **options})


def test_weight_one_is_exactly_no_weight_and_others_have_an_effect(pipe):
    plain = run(pipe).tensor
    assert torch.equal(run(pipe, "a (red:1) apple").tensor, plain) and torch.equal(
        run(pipe, "(a red apple:1.0)").tensor, plain
    )
    stronger, weaker = run(pipe, "a (red:1.5) apple").tensor, run(pipe, "a (red:0.5) apple").tensor
    assert (stronger - plain).abs().max() > 1e-4 and (weaker - plain).abs().max() > 1e-4
    assert torch.equal(run(pipe, "a (red:1.5) apple").tensor, stronger)


@pytest.mark.parametrize("n", [1, 75, 76, 300])
def test_images_of_long_prompts_do_not_depend_on_the_batch(pipe, n):
    prompt = " ".join(("red", "apple", "cat")[i % 3] for i in range(n))
    alone = run(pipe, prompt, seed=1).tensor
    both = run(pipe, ["cat", prompt], seed=0)
    # matrix products of another batch size and length round differently, over 2 steps in float32
    assert torch.allclose(both.tensor[1], alone[0], atol=1e-5) and torch.allclose(
        both.tensor[0], run(pipe, "cat").tensor[0], atol=1e-5
    )
    # the last word has an effect
    assert not torch.allclose(run(pipe, prompt + " blue", seed=1).tensor, alone, atol=1e-5)


def test_every_image_may_have_its_own_negative_prompt(pipe):
    images = run(pipe, ["cat", "a red apple"], negative=["blue", ""], n=2, seed=[5, 6, 7, 7])
    assert images.seeds == (5, 6, 7, 7) and images.recipe["negative"] == ["blue", "blue", "", ""]
    assert torch.allclose(images.tensor[1], run(pipe, "cat", negative="blue", seed=6).tensor[0], atol=1e-5)
    assert torch.allclose(images.tensor[2], run(pipe, seed=7).tensor[0], atol=1e-5) and torch.allclose(
        images.tensor[2], images.tensor[3], atol=1e-5
    )
    four = run(pipe, "cat", negative=["blue", "red", "", "a"], n=4)
    assert torch.allclose(four.tensor[1], run(pipe, "cat", negative="red", seed=1).tensor[0], atol=1e-5)


@pytest.mark.parametrize(
    "prompt", ["", " ", "🍎", "שלום", "a‏red", "\x00cat\x07", "cat\n\tred", "(", "())", "{", "|"]
)
def test_any_text_gives_a_reproducible_image_and_a_warning_for_unknown_words(pipe, prompt, recwarn):
    first = run(pipe, prompt).tensor
    said = " ".join(str(w.message) for w in recwarn if w.category is UnknownWords)
    left_out = {"🍎": "'🍎'", "שלום": "'שלום'", "\x00cat\x07": repr("\x00"), "(": "'('", "|": "'|'"}
    assert left_out.get(prompt, "") in said and bool(said) == bool(
        prompt.strip() and not prompt.isascii() or set(prompt) & set("(){|\0")
    )
    assert torch.equal(run(pipe, prompt).tensor, first) and bool(first.isfinite().all())


def test_recipes_of_weighted_prompts_and_lists_are_json(pipe):
    import json

    recipe = json.loads(
        json.dumps(dict(run(pipe, ["(red:1.2) apple", "{cat|apple}"], negative=["blue", "cat"]).recipe))
    )
    assert (
        recipe["prompt"] == ["(red:1.2) apple", "{cat|apple}"]
        and recipe["negative"] == ["blue", "cat"]
        and recipe["replayable"]
    )


def test_words_of_weighted_and_long_prompts_are_found_in_a_trace(pipe):
    with ldm.trace(pipe) as t:
        run(pipe, "cat " * 80 + "(red:1.3) apple")
    assert (
        t.words()[-2:] == ["red", "apple"]
        and t.steps[0].attention
        and t.attention("apple").shape == (1, 8, 8)
    )
    last = t.pipe.text.places(t.prompts[0])[-1][1]
    assert last == [84]  # 75 cats between start and end, a second start at 77, five cats, red
