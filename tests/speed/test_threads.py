"""Threads that share a pipeline draw the images that they draw one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from tiny_dalle import tiny_dalle
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_karlo
from torch import Tensor

import ldm
from ldm.support.calls import own_state, separate_call

THREADS = 8
PROMPTS = ("a red cat", "apple", "red apple on blue background", "cat")
MODES = {
    "plain": None,
    "optimized": {},
    "without-kernels": {"kernels": False},
    "memory": {"memory": True},
    "reuse": {"reuse": 2},
    "memory-reuse": {"memory": True, "reuse": 2},
    "merge": {"merge": 0.5},
    "int8": {"int8": True},
}
Task = Callable[[], Tensor]


def made(mode: str, pipe):
    if mode == "int8" and not torch.cpu._is_vnni_supported():
        pytest.skip("needs AVX-512 VNNI")
    options = MODES[mode]
    return pipe if options is None else ldm.optimize(pipe, **options)


def draw(pipe, i: int, steps: int = 3) -> Tensor:
    """Draw the image number i, of two sizes."""
    side = 32 + 16 * (i % 2)
    return pipe.text_to_image(
        PROMPTS[i % 4], seed=i, steps=steps, height=side, width=32, progress=False
    ).tensor


def edit(pipe, i: int) -> Tensor:
    return pipe.edit("cat", "red apple", seed=i, steps=3, progress=False).tensor


def traced(pipe, i: int, steps: int = 3) -> Tensor:
    """Draw an image under a trace of two modules, and check that the trace is of this call."""
    middle, decoder = ("unet.mid_block", "vae.decoder.mid_block")
    if not hasattr(pipe.denoiser.net, "mid_block"):  # a transformer
        middle, decoder = ("unet.blocks.1", "vae.residual.mid_block")
    with ldm.trace(pipe, hooks=[middle, decoder]) as trace:
        image = draw(pipe, i, steps)
    assert trace.prompts == (PROMPTS[i % 4],) and len(trace.steps) == steps
    assert len(trace.outputs[decoder]) == 1
    return image


def nested(pipe, i: int) -> Tensor:
    """Draw an image with another call in the middle of its run."""

    def between(step, x, denoised) -> None:
        if step == 1:
            draw(pipe, i + 1)

    return pipe.text_to_image(PROMPTS[i % 4], seed=i, steps=3, progress=False, on_step=between).tensor


def from_image(pipe, i: int) -> Tensor:
    given = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(i))
    return pipe.image_to_image(PROMPTS[i % 4], given, seed=i, steps=4, strength=0.5, progress=False).tensor


KINDS = {"draw": draw, "edit": edit, "traced": traced, "nested": nested, "image": from_image}


def run_together(tasks: Sequence[Task]) -> list[Tensor]:
    """Return the results of tasks that run in `THREADS` threads, which begin at the same time."""
    gate = threading.Barrier(THREADS)

    def begin(task: Task, first: bool) -> Tensor:
        if first:
            gate.wait()
        return task()

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(begin, task, i < THREADS) for i, task in enumerate(tasks)]
        return [future.result() for future in futures]


def wrong(expected: Sequence[Tensor], got: Sequence[Tensor]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if not torch.equal(a, b)]


def check(pipe, kind: str, count: int) -> None:
    """Compare tasks in threads with the same tasks one after the other."""
    kinds = list(KINDS.values()) if kind == "mixed" else [KINDS[kind]]
    tasks = [partial(kinds[i % len(kinds)], pipe, i) for i in range(count)]
    expected = [task() for task in tasks]
    assert wrong(expected, run_together(tasks)) == []


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "memory-reuse"])
def test_threads_draw_the_images_of_sequential_calls(mode):
    check(made(mode, tiny_model()), "mixed", 10)


@pytest.mark.parametrize("mode", ["memory", "reuse"])
def test_threads_draw_images_of_unclip(mode):
    pipe = made(mode, tiny_karlo())
    tasks = [
        partial(pipe.text_to_image, "a red cat", n=1, seed=i, steps=2, prior_steps=2, progress=False)
        for i in range(THREADS)
    ]
    images = [lambda task=task: task().tensor for task in tasks]
    assert wrong([image() for image in images], run_together(images)) == []


@pytest.mark.parametrize("mode", ["plain", "optimized", "memory"])
def test_threads_draw_images_of_tokens(mode):
    pipe = made(mode, tiny_dalle())
    mask = torch.zeros(64, 64)
    mask[16:40, 16:] = 1

    def task(i: int) -> Tensor:
        if i % 3 < 2:
            return pipe.text_to_image(PROMPTS[i % 4], n=1 + i % 2, seed=i, progress=False).tensor
        given = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i))
        return pipe.inpaint(PROMPTS[i % 4], given, mask, n=1, seed=i, progress=False).tensor

    tasks = [partial(task, i) for i in range(2 * THREADS)]
    assert wrong([each() for each in tasks], run_together(tasks)) == []


@pytest.mark.parametrize("mode", ["optimized", "memory", "reuse"])
def test_a_change_of_weights_between_calls_is_seen_in_all_threads(mode):
    pipe, fresh = made(mode, tiny_model()), made(mode, tiny_model())
    tasks = [partial(draw, pipe, i) for i in range(THREADS)]
    before = run_together(tasks)
    for own in (pipe, fresh):
        for part in (own.denoiser.net.mid_block.resnets[0].conv1, own.vae.decoder.conv_in):
            part.weight.data.mul_(2)
    expected = [draw(fresh, i) for i in range(THREADS)]
    assert wrong(expected, run_together(tasks)) == []
    assert len(wrong(before, expected)) == THREADS


def test_state_is_kept_for_the_call_or_the_thread():
    pipe, owner = tiny_model(), tiny_model()
    mine = own_state(owner, list)
    mine.append(1)
    assert own_state(owner, list) is mine
    with separate_call(pipe):
        assert own_state(owner, list) == []
        with separate_call(pipe):
            own_state(owner, list).append(2)
        assert own_state(owner, list) == []
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(own_state, owner, list).result() == []
    assert own_state(owner, list) is mine


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["draw", "edit", "traced", "nested", "mixed"])
@pytest.mark.parametrize(
    ("model", "mode"),
    [
        *(pytest.param(tiny_model, mode, id=f"tiny-{mode}") for mode in MODES),
        *(
            pytest.param(partial(ldm.load, "emoji-ldm"), mode, id=f"emoji-ldm-{mode}")
            for mode in MODES
            if mode not in ("merge", "int8")  # which act on UNets alone
        ),
    ],
)
def test_four_hundred_images_of_threads(model, mode, kind):
    """40 combinations of modes and tasks with 10 images each, and 30 of emoji-ldm."""
    check(made(mode, model()), kind, 10)
