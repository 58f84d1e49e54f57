"""Test text to image on a tiny model: seeds, batches, guidance, sizes, prompts, wrong input."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_latent_diffusion import tiny_model

import ldm
from ldm import SAMPLERS, TimeGrid
from ldm.diffusion.noise import initial_noise
from ldm.images.canvas import Padded
from ldm.pipelines.checks import UnknownWords


@pytest.fixture(scope="module")
def pipe():
    return tiny_model()


def run(pipe, prompt="a red apple", **options):
    return pipe.text_to_image(prompt, progress=False, **options)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_image_i_of_a_batch_is_the_image_of_its_seed(pipe, sampler):
    batch = run(pipe, n=4, seed=7, sampler=sampler)
    assert batch.seeds == (7, 8, 9, 10)
    for i in range(4):
        alone = run(pipe, seed=7 + i, sampler=sampler)
        # the noise is bit-identical, but matrix products of another batch size round differently: by a few
        # float32 ulp over 4 steps
        assert torch.allclose(batch.tensor[i], alone.tensor[0], atol=1e-5)
    assert not torch.allclose(batch.tensor[0], batch.tensor[1], atol=1e-2)


def test_seeds_may_be_a_list_and_a_seed_gives_the_first_noise_of_diffusers(pipe):
    assert run(pipe, n=2, seed=[9, 7]).seeds == (9, 7)
    assert torch.allclose(run(pipe, n=2, seed=[9, 7]).tensor[1], run(pipe, seed=7).tensor[0], atol=1e-5)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise, initial_noise([7], (4, 8, 8)))
    assert torch.equal(run(pipe, latents=noise).tensor, run(pipe, seed=7).tensor)


def test_the_same_call_gives_a_bit_identical_image(pipe):
    assert torch.equal(run(pipe, n=2).tensor, run(pipe, n=2).tensor)


def test_several_prompts_with_several_images_each(pipe):
    images = run(pipe, ["a red apple", "cat"], n=2)
    assert images.prompts == ("a red apple", "a red apple", "cat", "cat") and images.seeds == (0, 1, 2, 3)
    # the shorter prompt is padded in the batch, and its padding is not attended to
    assert torch.allclose(images.tensor[2], run(pipe, "cat", seed=2).tensor[0], atol=1e-5)
    assert not torch.allclose(images.tensor[2], run(pipe, "a red apple", seed=2).tensor[0], atol=1e-3)


def test_guidance_one_is_the_conditional_model_with_one_evaluation_per_step(pipe):
    sizes = []
    hook = pipe.denoiser.net.register_forward_hook(lambda net, inputs, output: sizes.append(len(inputs[0])))
    run(pipe, guidance=1.0)
    assert sizes == [1] * 4
    sizes.clear()
    run(pipe, guidance=3.0)
    hook.remove()
    assert sizes == [2] * 4
    # the prompt has no effect
    assert torch.equal(run(pipe, guidance=0.0).tensor, run(pipe, "cat", guidance=0.0).tensor)


def test_an_empty_prompt_is_unconditional(pipe):
    assert torch.allclose(run(pipe, "", guidance=5.0).tensor, run(pipe, guidance=0.0).tensor, atol=1e-5)
    assert not torch.allclose(run(pipe, negative="cat").tensor, run(pipe).tensor, atol=1e-4)


def test_width_and_height_can_be_given(pipe):
    assert run(pipe, height=48, width=64).tensor.shape == (1, 3, 48, 64)


def test_a_grid_can_be_given(pipe):
    grid = TimeGrid.make(pipe.denoiser.schedule, 4, spacing="trailing")
    assert torch.equal(run(pipe, grid=grid).tensor, run(pipe, steps=4).tensor)


def test_on_step_sees_every_step_and_can_change_x_or_stop(pipe):
    seen = []
    run(pipe, on_step=lambda i, x, d: seen.append((i, x.shape)))
    assert seen == [(i, (1, 4, 8, 8)) for i in range(4)]
    zero = run(pipe, on_step=lambda i, x, d: torch.zeros_like(x) if i == 3 else None)
    assert torch.allclose(zero.tensor, pipe.decode(torch.zeros(1, 4, 8, 8)), atol=1e-6)

    def stop(i, x, d):
        seen.append(i)
        raise StopIteration

    seen.clear()
    run(pipe, on_step=stop)
    assert seen == [0]


def test_keep_steps_decodes_every_step(pipe, tmp_path):
    plain = run(pipe, n=2)
    made = run(pipe, n=2, keep_steps=True)
    assert torch.equal(made.tensor, plain.tensor) and plain.steps is None and made.recipe == plain.recipe
    # the last step gives x0
    assert made.steps.shape == (4, 2, 3, 32, 32) and torch.allclose(made.steps[-1], made.tensor, atol=1e-6)
    assert made.animate(tmp_path / "x.gif").stat().st_size > 0
    again = pipe.image_to_image("cat", torch.rand(3, 32, 32), strength=0.5, progress=False, keep_steps=True)
    assert again.steps.shape == (2, 1, 3, 32, 32)
    with pytest.warns(Padded):
        cut = pipe.image_to_image("cat", torch.rand(3, 30, 32), strength=0.5, progress=False, keep_steps=True)
    assert cut.steps.shape == (2, 1, 3, 30, 32)


def test_unknown_words_are_named_in_a_warning(pipe):
    with pytest.warns(UnknownWords, match="never seen 'zeppelin', 'azure'"):
        run(pipe, "a zeppelin on azure zeppelin background")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 30}, "height 30: expected a multiple of 4"),
        ({"width": 2}, "width 2: expected a multiple of 4"),
        ({"n": 0}, "n: expected a number of images of at least 1, got 0"),
        ({"n": 1.5}, "n: expected"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"sampler": "dpmp_2m"}, "did you mean 'dpmpp_2m'"),
        ({"sampler": "ddim", "etta": 1.0}, "did you mean 'eta'"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        (
            {"latents": torch.zeros(1, 4, 3, 3)},
            r"latents of the model have shape \(1, 4, 3, 3\), expected \(1, 4, 8, 8\)",
        ),
        ({"prompt": []}, "prompt"),
        ({"prompt": "(cat:2"}, r"a weight is not closed: expected \(red:1.3\)"),
        (
            {"negative": ["cat", "cat"]},
            "negative: expected a text, or 1 .one for each prompt. or 1 .for each image.",
        ),
    ],
)
def test_wrong_input_is_refused_with_what_was_expected(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **{"prompt": "cat", **options})


def test_every_sampler_runs_on_the_pipeline(pipe):
    for name in SAMPLERS:
        assert torch.isfinite(run(pipe, sampler=name, steps=4).tensor).all()


def test_nan_is_an_error_and_not_a_black_image(pipe):
    with pytest.raises(ValueError, match="NaN"):
        run(pipe, on_step=lambda i, x, d: x * float("nan"))


def test_scalars_of_numpy_and_torch_are_options_like_any_other(pipe, tmp_path):
    plain = run(pipe, n=2, seed=3, height=32, width=32, steps=4, guidance=2.5, sampler="ddim", eta=0.5)
    scalars = run(
        pipe,
        n=np.int64(2),
        seed=np.int64(3),
        height=np.int64(32),
        width=torch.tensor(32),
        steps=np.int32(4),
        guidance=np.float32(2.5),
        sampler="ddim",
        eta=np.float32(0.5),
    )
    assert torch.equal(plain.tensor, scalars.tensor) and plain.recipe == scalars.recipe
    given = torch.rand(1, 3, 32, 32)
    made = pipe.image_to_image("cat", given, strength=np.float32(0.5), progress=False)
    assert made.recipe["strength"] == 0.5
    for images in (scalars, made):
        images.save(tmp_path / "a.png")


def test_no_seed_draws_seeds_that_the_recipe_states(pipe):
    made = run(pipe, n=2, seed=None)
    assert made.recipe["seed"] == list(made.seeds) and made.seeds[1] == made.seeds[0] + 1
    assert torch.equal(run(pipe, n=2, seed=made.recipe["seed"]).tensor, made.tensor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height: expected a whole number of at least 1, got 0"),
        ({"width": 32.0}, "width: expected a whole number of at least 1, got 32.0"),
        ({"steps": 2.5}, "steps: expected a whole number, got 2.5"),
        ({"guidance": float("nan")}, "guidance: expected a finite number, got nan"),
        ({"seed": [2.7]}, "seed: expected whole numbers from 0 to .*, got 2.7"),
        ({"prompt": None}, "prompt: expected a text or several, got None"),
    ],
)
def test_options_that_are_no_such_numbers_are_errors(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **{"prompt": "cat", **options})


def test_there_need_be_no_standard_error(pipe, monkeypatch):
    expected = run(pipe).tensor
    monkeypatch.setattr(sys, "stderr", None)
    assert torch.equal(pipe.text_to_image("a red apple").tensor, expected)


def test_calls_leave_no_tensor_behind(pipe):
    def live() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    def call(i: int) -> None:
        run(pipe, ("cat", "red apple")[i % 2], seed=i, steps=2)
        if i % 30 == 0:
            pipe.image_to_image("cat", torch.rand(1, 3, 32, 32), strength=0.5, steps=2, progress=False)
            pipe.edit("cat", "red apple", steps=2, progress=False)

    for i in range(60):
        call(i)
    before = live()
    for i in range(240):
        call(i)
    assert live() <= before + 5


def test_edits_and_traces_of_one_thread_do_not_reach_another(pipe):
    """Run plain calls beside edits, of the same pipe, until both have run many times."""
    expected = [run(pipe, seed=i).tensor for i in range(4)]
    edited = pipe.edit("cat", "red apple", seed=1, progress=False).tensor

    def edit(_: int) -> torch.Tensor:
        with ldm.trace(pipe) as traced:
            made = pipe.edit("cat", "red apple", seed=1, progress=False).tensor
            run(pipe, "cat")
        assert traced.prompts == ("cat",) and len(traced.steps) == len(traced.images.recipe["seed"]) * 4
        return made

    with ThreadPoolExecutor(4) as pool:
        plain = [pool.submit(lambda i=i: run(pipe, seed=i % 4).tensor) for i in range(24)]
        edits = list(pool.map(edit, range(8)))
    assert all(torch.equal(each.result(), expected[i % 4]) for i, each in enumerate(plain))
    assert all(torch.equal(made, edited) for made in edits)
