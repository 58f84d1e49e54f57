"""Drawings in one batch have the images that they have alone, and stop when they are not wanted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_exemplars import tiny_exemplar_model
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_karlo

from ldm.conditioning import read_prompts
from ldm.conditioning.layouts import LAYOUT_ROWS, LAYOUT_STEPS
from ldm.images.result import Images
from ldm.pipelines.tasks.deferred import Deferred, deferred
from ldm.pipelines.together import Together, Unwanted
from ldm.support.calls import checkpoint, interruptible

PROMPTS = ("a red cat", "apple", "a cat on blue background")


def drawings(pipe, **options):
    return [
        deferred(partial(pipe.text_to_image, prompt, seed=3 + i, n=1 + i, progress=False, **options))
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "dpm_adaptive"])
def test_each_drawing_has_the_bits_of_its_own(sampler):
    pipe = tiny_model()
    made = Together(pipe).draw(drawings(pipe, sampler=sampler, negative="blue"))
    for images, prompt, i in zip(made, PROMPTS, range(3), strict=True):
        own = pipe.text_to_image(
            prompt, seed=3 + i, n=1 + i, sampler=sampler, negative="blue", progress=False
        )
        assert torch.equal(images.tensor, own.tensor) and images.recipe == own.recipe


def test_batches_that_round_differently_are_close():
    pipe = tiny_model()
    both = Together(pipe, exact=False).draw(drawings(pipe))
    for i, images in enumerate(both):
        own = pipe.text_to_image(PROMPTS[i], seed=3 + i, n=1 + i, progress=False)
        assert torch.allclose(images.tensor, own.tensor, atol=1e-4) and images.recipe == own.recipe


def noisy(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def hole(corner: int, side: int = 32) -> Image.Image:
    made = Image.new("L", (side, side), 0)
    made.paste(255, (corner, corner, corner + 12, corner + 12))
    return made


def text_to_image(pipe, i, **options):
    return pipe.text_to_image(PROMPTS[i], seed=i, n=1 + i, steps=3, progress=False, **options)


TASKS = {
    "text_to_image": text_to_image,
    "decode": partial(text_to_image, upsample=False),
    "image_to_image": lambda pipe, i: pipe.image_to_image(
        PROMPTS[i], noisy(i), strength=0.5, seed=i, n=1 + i, steps=4, progress=False
    ),
    "inpaint": lambda pipe, i: pipe.inpaint(
        PROMPTS[i], noisy(i), hole(4 * i), seed=i, n=1 + i, steps=3, progress=False
    ),
    "variations": lambda pipe, i: pipe.variations(noisy(i), seed=i, n=1 + i, steps=4, progress=False),
}
LATENT = ("text_to_image", "image_to_image", "inpaint", "variations")


@pytest.mark.parametrize(
    ("make", "task", "exact"),
    [
        *(
            (make, task, exact)
            for make in (tiny_model, tiny_exemplar_model)
            for task in LATENT
            for exact in (0, 1)
        ),
        *((tiny_karlo, task, 1) for task in ("text_to_image", "variations", "inpaint")),
        (tiny_karlo, "decode", 0),  # random upsamplers make rounding visible
    ],
)
def test_every_task_has_the_images_of_its_own(make, task, exact):
    pipe, run = make(), TASKS[task]
    own = [run(pipe, i) for i in range(3)]
    asked = [deferred(partial(run, pipe, i)) for i in range(3)]
    assert all(isinstance(each, Deferred) for each in asked)
    rows: list[int] = []
    forward = pipe.stage.denoiser.net.forward

    def counted(x, *args, **options):
        rows.append(len(x))
        return forward(x, *args, **options)

    pipe.stage.denoiser.net.forward = counted
    made = Together(pipe, exact=bool(exact)).draw(asked)
    for images, expected in zip(made, own, strict=True):
        assert images.recipe == expected.recipe and images.seeds == expected.seeds
        assert torch.allclose(images.tensor, expected.tensor, atol=1e-4)
        assert not exact or torch.equal(images.tensor, expected.tensor)
    if not exact:
        assert {n % 6 for n in rows[-2:]} == {0}, rows  # all six images, under guidance twice


def test_layouts_of_all_drawings_are_drawn_at_once():
    pipe, rows = tiny_exemplar_model(), []
    pipe.text.layout.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    drawn = [deferred(partial(pipe.text_to_image, "a cat", seed=i, progress=False)) for i in range(4)]
    Together(pipe).draw(drawn)
    assert rows == [LAYOUT_ROWS] * LAYOUT_STEPS


def test_texts_of_one_length_are_sampled_in_one_batch(monkeypatch):
    pipe, rows = tiny_exemplar_model(), []
    prompts = ["a cat", "a cat " * 20, "a cat on a blue background", "a cat " * 20]
    own = [pipe.text_to_image(prompts[i], seed=i, steps=2, progress=False) for i in range(4)]
    asked = [
        deferred(partial(pipe.text_to_image, prompts[i], seed=i, steps=2, progress=False)) for i in range(4)
    ]
    together = Together(pipe, exact=False)
    same, sample = together._same, together._sample

    def of_one_length(stage, parts, **options):
        return len({part.lengths for part in parts}) == 1 and same(stage, parts, **options)

    monkeypatch.setattr(together, "_same", of_one_length)
    monkeypatch.setattr(
        together, "_sample", lambda parts, wanted: rows.append([*parts]) or sample(parts, wanted)
    )
    made = together.draw(asked)
    assert rows == [[0, 2], [1, 3]]
    assert all(torch.allclose(a.tensor, b.tensor, atol=1e-4) for a, b in zip(made, own, strict=True))


def test_prompts_are_read_once_until_what_they_depend_on_changes(monkeypatch):
    pipe, read = tiny_exemplar_model(), []
    encode = pipe.text.text.encode
    pipe.text.text.encode = lambda rows: read.append(len(rows)) or encode(rows)
    together = Together(pipe)

    def reads() -> int:
        own = [pipe.text_to_image("a cat", seed=i, steps=2, progress=False) for i in range(2)]
        asked = [
            deferred(partial(pipe.text_to_image, "a cat", seed=i, steps=2, progress=False)) for i in range(2)
        ]
        read.clear()
        for images, expected in zip(together.draw(asked), own, strict=True):
            assert torch.equal(images.tensor, expected.tensor)
        return len(read)

    both = 2  # the prompt, and the empty one of guidance
    assert [reads(), reads(), reads()] == [both, 0, 0]
    next(pipe.text.text.parameters()).data.numpy()[0] += 1  # which no version counter records
    assert [reads(), reads()] == [both, 0]
    pipe.exemplars.add("my cat", noisy(0, 16).convert("RGBA"))
    assert [reads(), reads()] == [both, 0]
    handle = pipe.text.text.tower.register_forward_hook(lambda *_: None)
    assert [reads(), reads()] == [both, both]
    handle.remove()
    assert reads() == 0
    monkeypatch.setattr(read_prompts, "REMEMBERED", 1)
    assert [reads(), reads()] == [1, 1]  # of two that are kept, the first is forgotten


def test_drawings_of_different_grids_are_sampled_one_after_another():
    pipe = tiny_model()
    asked = [
        deferred(partial(pipe.text_to_image, "a cat", steps=steps, seed=steps, progress=False))
        for steps in (2, 3)
    ]
    for steps, images in zip((2, 3), Together(pipe, exact=False).draw(asked), strict=True):
        own = pipe.text_to_image("a cat", steps=steps, seed=steps, progress=False)
        assert torch.equal(images.tensor, own.tensor)


def test_an_error_in_one_drawing_does_not_end_the_others(monkeypatch):
    pipe = tiny_model()
    begin, reported = pipe.begin, {}

    def failing(call, request):
        if call.prompts[0] == PROMPTS[1]:
            raise ValueError("prompt: refused")
        return begin(call, request)

    monkeypatch.setattr(pipe, "begin", failing)
    made = Together(pipe, exact=False).draw(drawings(pipe), ready=reported.update)
    assert str(made[1]) == "prompt: refused" and reported == dict(enumerate(made))
    assert isinstance(made[0], Images) and isinstance(made[2], Images)


def test_a_comparison_holds_for_its_own_guidance_only():
    pipe = tiny_model()
    together = Together(pipe)
    for guidance in (1.0, 3.0):
        together.draw(drawings(pipe, guidance=guidance))
    assert len(together._compared) == 2 * len(PROMPTS)


def test_a_task_is_carried_out_at_once_outside_the_block():
    pipe = tiny_model()
    drawing = deferred(lambda: pipe.text_to_image("a cat", seed=1, progress=False))
    own = pipe.text_to_image("a cat", seed=1, progress=False)
    assert torch.equal(drawing.finished(pipe.draw(drawing.call, drawing.request)).tensor, own.tensor)


@pytest.mark.parametrize("exact", [True, False])
def test_a_drawing_that_is_no_longer_wanted_is_dropped(exact):
    pipe = tiny_model()
    rows = []
    together = Together(pipe, exact=exact)
    expected = together.draw(drawings(pipe))
    forward = pipe.denoiser.net.forward

    def counted(x, *args, **options):
        rows.append(len(x))
        return forward(x, *args, **options)

    pipe.denoiser.net.forward = counted
    made = together.draw(drawings(pipe), lambda i: i != 2 or len(rows) < 2)
    assert isinstance(made[2], Unwanted)
    for images, own in zip(made[:2], expected[:2], strict=True):
        assert torch.allclose(images.tensor, own.tensor, atol=1e-4)
    if not exact:  # six images with and without their prompts, then those of the first two calls
        assert rows[:2] == [12, 12] and set(rows[2:]) == {6}


def test_nothing_goes_on_when_no_drawing_is_wanted():
    pipe = tiny_model()
    asked = []

    def wanted(i: int) -> bool:
        asked.append(i)
        return len(asked) < 4

    made = Together(pipe, exact=False).draw(drawings(pipe), wanted)
    assert [type(each) for each in made] == [Unwanted] * 3


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
