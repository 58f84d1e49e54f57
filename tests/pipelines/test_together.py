"""Calls in one batch give the images that they give alone, and stop when they are not wanted."""

from __future__ import annotations

import pytest
import torch
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_karlo

from ldm.pipelines.together import Together, Unwanted
from ldm.support.calls import checkpoint, interruptible

PROMPTS = ("a red cat", "apple", "a cat on blue background")


def calls(pipe, **options):
    return [
        pipe.settle(prompt, seed=3 + i, n=1 + i, progress=False, **options)
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "dpm_adaptive"])
def test_each_call_has_the_bits_of_its_own(sampler):
    pipe = tiny_model()
    made = Together(pipe).draw(calls(pipe, sampler=sampler, negative="blue"))
    for images, prompt, i in zip(made, PROMPTS, range(3), strict=True):
        own = pipe.text_to_image(
            prompt, seed=3 + i, n=1 + i, sampler=sampler, negative="blue", progress=False
        )
        assert torch.equal(images.tensor, own.tensor) and images.recipe == own.recipe


def test_batches_that_round_differently_are_close():
    pipe = tiny_model()
    both = Together(pipe, exact=False).draw(calls(pipe))
    for images, call in zip(both, calls(pipe), strict=True):
        own = pipe.text_to_image(call.prompts[0], seed=call.seeds, n=len(call.seeds), progress=False)
        assert torch.allclose(images.tensor, own.tensor, atol=1e-4) and images.recipe == own.recipe


@pytest.mark.parametrize("exact", [True, False])
def test_a_call_that_is_no_longer_wanted_is_dropped(exact):
    pipe = tiny_model()
    rows = []
    together = Together(pipe, exact=exact)
    expected = together.draw(calls(pipe))
    forward = pipe.denoiser.net.forward

    def counted(x, *args, **options):
        rows.append(len(x))
        return forward(x, *args, **options)

    pipe.denoiser.net.forward = counted
    made = together.draw(calls(pipe), lambda i: i != 2 or len(rows) < 2)
    assert made[2] is None
    for images, own in zip(made[:2], expected[:2], strict=True):
        assert torch.allclose(images.tensor, own.tensor, atol=1e-4)
    if not exact:  # six images with and without their prompts, then those of the first two calls
        assert rows[:2] == [12, 12] and set(rows[2:]) == {6}


def test_nothing_goes_on_when_no_call_is_wanted():
    pipe = tiny_model()
    asked = []

    def wanted(i: int) -> bool:
        asked.append(i)
        return len(asked) < 4

    assert Together(pipe, exact=False).draw(calls(pipe), wanted) == [None, None, None]


@pytest.mark.parametrize("make", [tiny_model, tiny_karlo])
def test_a_check_ends_a_call_at_any_step_of_any_stage(make):
    pipe, seen = make(), []
    options = {"progress": False, "n": 1}
    with interruptible(lambda done, total: seen.append((done, total))):
        pipe.text_to_image("a cat", **options)
    totals = [total for done, total in seen if done == 1]
    assert [pair for total in totals for pair in [(k + 1, total) for k in range(total)]] == seen
    for stop in range(1, len(seen) + 1):
        count = []

        def check(done: int, total: int, stop: int = stop, count: list[int] = count) -> None:
            count.append(done)
            if len(count) == stop:
                raise Unwanted

        with pytest.raises(Unwanted), interruptible(check):
            pipe.text_to_image("a cat", **options)
        assert len(count) == stop


def test_checks_are_nested():
    seen = []
    with interruptible(lambda *_: seen.append("outer")):
        with interruptible(lambda *_: seen.append("inner")):
            checkpoint(1, 2)
        checkpoint(2, 2)
    checkpoint(3, 2)
    assert seen == ["outer", "inner", "outer"]
