"""Traces: they do not change a run, maps are probabilities, and wrong arguments raise errors."""

from __future__ import annotations

import pytest
import torch
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_karlo, tiny_stable

import ldm
from ldm.models.layers.attention import Attention, attention_control

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def pipe():
    return tiny_model()


def run(pipe, prompt=PROMPT, **options):
    return pipe.text_to_image(prompt, progress=False, **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_traced_run_is_the_untraced_one(guidance, dtype):
    pipe = tiny_model().to(dtype)
    plain = run(pipe, n=2, guidance=guidance)
    with ldm.trace(pipe) as t:
        traced = run(pipe, n=2, guidance=guidance)
    # bit-identical: an explicit product in place of the fused kernel would differ by up to 1e-5 in float32
    assert torch.equal(traced.tensor, plain.tensor) and t.images is traced
    assert torch.equal(run(pipe, n=2, guidance=guidance).tensor, plain.tensor) and pipe.watchers == ()
    assert all(
        part.controls == () and not part._forward_pre_hooks
        for part in pipe.denoiser.modules()
        if isinstance(part, Attention)
    )


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "dpmpp_2s_a"])
def test_every_step_has_maps_whose_rows_sum_to_one(pipe, sampler):
    with ldm.trace(pipe) as t:
        run(pipe, ["a red apple", "cat"], guidance=2.0, sampler=sampler)
    assert [step.index for step in t.steps] == [0, 1, 2, 3] and t.levels() == [(4, 4)]
    times = [step.t for step in t.steps]
    assert times == sorted(times, reverse=True)
    for step in t.steps:
        assert step.x0.shape == (2, 4, 8, 8) and len(step.attention) == 4
        for p in step.attention.values():
            assert p.shape == (2, 4, 4, 5) and (p.sum(-1) - 1).abs().max() < 1e-6
            assert p[1, ..., 3:].abs().max() == 0  # "cat" has start, one token and end; the rest is padding


def test_the_maps_are_of_the_conditional_branch(pipe):
    maps = {}
    for guidance in (1.0, 2.0):
        with ldm.trace(pipe) as t:
            run(pipe, guidance=guidance, steps=1)  # in the first step both have the same x
        maps[guidance] = t.attention("apple")
    assert torch.allclose(maps[1.0], maps[2.0], atol=1e-6)
    with ldm.trace(pipe) as t:
        run(pipe, guidance=0.0, steps=1)
    assert t.steps[0].attention == {}  # there is no attention to the prompt


def test_words_are_found_with_all_their_tokens(pipe):
    with ldm.trace(pipe) as t:
        run(pipe, "a red apple on a blue background", steps=2)
    assert t.words() == ["a", "red", "apple", "on", "a", "blue", "background"]
    # (1, 4, 4, 9)
    p = torch.stack([torch.stack(list(step.attention.values())).mean(0) for step in t.steps]).mean(0)
    enlarged = torch.nn.functional.interpolate(p.permute(0, 3, 1, 2), (8, 8), mode="bilinear")
    assert torch.allclose(t.attention("Apple"), enlarged[:, 3], atol=1e-6)
    assert torch.allclose(t.attention("red apple"), enlarged[:, 2] + enlarged[:, 3], atol=1e-6)
    assert torch.allclose(t.attention("a"), enlarged[:, 1] + enlarged[:, 5], atol=1e-6)  # both occurrences
    total = sum(t.attention(word) for word in dict.fromkeys(t.words()))
    assert bool((total < 1).all()) and bool((total > 0.2).all())  # the rest is on start and end
    first, last = t.attention("apple", steps=[0]), t.attention("apple", steps=[1])
    assert torch.allclose((first + last) / 2, t.attention("apple"), atol=1e-6)
    assert torch.equal(t.attention("apple", level=(4, 4)), t.attention("apple"))


def test_attention_that_is_put_on_one_half_is_shown_there(pipe):
    def left(name, p):  # only the left half attends to token 3; the rest attends to the start
        p = p.clone().unflatten(2, (4, 4))
        p[..., :2, 3], p[..., 2:, 3] = 0.5, 0.0
        p[..., 0] = 1 - p[..., 1:].sum(-1)
        return p.flatten(2, 3)

    with attention_control(pipe.denoiser.net, left), ldm.trace(pipe) as t:
        made = run(pipe)
    where = t.attention("apple")[0]
    assert where[:, :3].min() > 0.4 and where[:, 5:].max() < 1e-6
    heat = t.heatmap("apple")
    assert heat.tensor.shape == made.tensor.shape and heat.prompts == ("apple in: a red apple",)
    redness = (heat.tensor[:, 0] - heat.tensor[:, 2])[0]
    assert redness[:, :10].min() > 0.5 and redness[:, 22:].abs().max() < 1e-6  # elsewhere the image is grey
    assert torch.allclose(heat.tensor[0, 0, :, 22:], made.tensor[0].mean(0)[:, 22:], atol=1e-6)


def test_predictions_and_norms(pipe):
    with ldm.trace(pipe) as t:
        made = run(pipe, n=2)
    frames = t.x0()
    assert len(frames) == 4 and frames[0].seeds == made.seeds
    # the last step of this sampler takes x0 as the data
    assert torch.allclose(frames[-1].tensor, made.tensor, atol=1e-6) and not torch.allclose(
        frames[0].tensor, made.tensor, atol=1e-3
    )
    norms = t.norms()
    assert set(norms) == {"x", "x0", "eps"} and all(value.shape == (4, 2) for value in norms.values())
    assert torch.allclose(norms["x0"][-1], t.steps[-1].x0.square().mean((1, 2, 3)).sqrt())
    assert torch.allclose(norms["x"][-1], norms["x0"][-1], atol=1e-5)


def test_any_named_module_can_be_hooked(pipe):
    plain = run(pipe)
    with ldm.trace(pipe, ["unet.mid_block", "text", "vae.decoder"]) as t:
        assert torch.equal(run(pipe, guidance=2.0).tensor, plain.tensor)
    assert [len(t.outputs[name]) for name in ("unet.mid_block", "text", "vae.decoder")] == [4, 2, 1]
    assert t.outputs["unet.mid_block"][0].shape == (2, 16, 4, 4)
    with ldm.trace(pipe, {"unet.mid_block": lambda module, inputs, output: torch.zeros_like(output)}):
        assert not torch.allclose(run(pipe).tensor, plain.tensor, atol=1e-3)
    assert torch.equal(run(pipe).tensor, plain.tensor)
    with pytest.raises(ValueError, match="'unet.mid_block'"), ldm.trace(pipe, ["unet.midblock"]):
        pass


def test_a_stopped_or_changed_run_is_recorded_as_it_went(pipe):
    def stop(i, x, d):
        if i == 1:
            raise StopIteration

    with ldm.trace(pipe) as t:
        run(pipe, on_step=stop)
        assert len(t.steps) == 2
        run(pipe, on_step=lambda i, x, d: torch.zeros_like(x) if i == 3 else None)
        assert len(t.steps) == 4  # a second run replaces the first


def test_other_tasks_are_traced_too(pipe):
    picture = torch.rand(3, 32, 32)
    with ldm.trace(pipe) as t:
        pipe.image_to_image(PROMPT, picture, strength=0.5, progress=False)
    assert len(t.steps) == 2 and t.attention("apple").shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("make", "shape", "side"), [(tiny_karlo, (2, 3, 16, 16), 16), (tiny_stable, (2, 4, 16, 16), 32)]
)
def test_an_unclip_s_decoder_is_traced_without_maps(make, shape, side):
    model, options = make(), {"n": 2, "steps": 3, "prior_steps": 2, "progress": False, "upsample": False}
    plain = model.text_to_image("a cat", **options)
    with ldm.trace(model, ["decoder.mid_block" if make is tiny_stable else "decoder.unet.mid_block"]) as t:
        traced = model.text_to_image("a cat", **options)
    assert (
        torch.equal(traced.tensor, plain.tensor)
        and t.images is traced
        and model.watchers == ()
        and t.prompts == ("a cat", "a cat")
    )
    assert [step.index for step in t.steps] == [0, 1, 2] and all(
        step.x0.shape == shape and step.attention == {} for step in t.steps
    )
    assert t.x0()[0].tensor.shape == (2, 3, side, side) and t.norms()["eps"].shape == (3, 2)
    assert [len(outputs) for outputs in t.outputs.values()] == [3]
    for asked in (t.levels, t.words, lambda: t.attention("cat"), lambda: t.heatmap("cat")):
        with pytest.raises(ValueError, match="attention is recorded for LatentDiffusion only"):
            asked()
    with ldm.trace(model) as t:
        # the caller's hook is still called
        model.text_to_image("a cat", **options, on_step=lambda i, x, d: x + i)
    assert not torch.equal(t.images.tensor, plain.tensor)


def test_wrong_arguments_raise_errors(pipe):
    with ldm.trace(pipe) as t:
        with pytest.raises(ValueError, match="nothing is recorded yet"):
            t.heatmap("apple")
        run(pipe)
    with pytest.raises(
        ValueError, match="word 'pear': expected a word of the prompt that has tokens: 'a', 'red', 'apple'"
    ):
        t.heatmap("pear")
    with pytest.raises(ValueError, match="word 'apple red'"):
        t.heatmap("apple red")
    with pytest.raises(ValueError, match=r"level: expected one of \[\(4, 4\)\], got \(8, 8\)"):
        t.heatmap("apple", level=(8, 8))
    with pytest.raises(ValueError, match="steps"):
        t.attention("apple", steps=[])
    with pytest.raises(TypeError, match="expected a LatentDiffusion or an UnCLIP, got int"), ldm.trace(3):
        pass
