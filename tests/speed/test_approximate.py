"""Approximations: how much they change the result, and that they can be removed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_networks import UNETS, inputs, make, rms
from tiny_exemplars import tiny_exemplar_model
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_karlo, tiny_stable

import ldm
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import lerp
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.dit import DiTConfig
from ldm.models.layers.attention import attention_control
from ldm.models.unet import UNetConfig
from ldm.samplers import SAMPLERS
from ldm.speed import merge
from ldm.speed.merge import assign, means, take
from ldm.speed.presets import SPEED_PRESETS
from ldm.speed.reuse import MOST_EVALUATIONS, DiTReuse, Reuse, UNetReuse, up_path
from ldm.weights.parts import build_network, randomise

DEEP = UNetConfig(channels=(32, 32, 64), depth=(0, 1, 1), blocks=2, heads=4, context_dim=24)
FULL, SHALLOW = "_full_evaluation", "_shallow_evaluation"
PROMPTS = ["a red cat", "apple on blue background"]


def images(pipe, **options):
    return pipe.text_to_image(PROMPTS, **{"steps": 6, "guidance": 3.0, "progress": False, **options}).tensor


def record_evaluations(net, monkeypatch):
    """Return a list to which `Reuse` appends the name of each evaluation."""
    made = []
    for name in (FULL, SHALLOW):
        plain = getattr(UNetReuse, name)
        monkeypatch.setattr(
            UNetReuse,
            name,
            lambda self, *args, name=name, plain=plain: made.append(name) or plain(self, *args),
        )
    return made


@torch.no_grad()
def test_an_interval_of_one_and_a_ratio_of_zero_are_exact_and_options_can_be_undone():
    pipe = ldm.optimize(tiny_model())
    exact, done = images(pipe), pipe.optimizations
    assert torch.equal(images(ldm.optimize(pipe, reuse=1, merge=0.0)), exact) and pipe.optimizations == done
    for options in ({"reuse": 2}, {"merge": 0.5}, {"reuse": 3, "branch": 1, "merge": 0.25}):
        assert not torch.equal(images(ldm.optimize(pipe, **options)), exact)
        assert sum("approximate" in line for line in pipe.optimizations) == len(options.keys() - {"branch"})
        assert not any("approximate" in line for line in ldm.optimize(pipe).optimizations)
        assert torch.equal(images(pipe), exact)
        assert all("forward" not in part.__dict__ for part in pipe.modules())


@torch.no_grad()
def test_presets_are_their_options_and_their_errors_are_ordered():
    pipe = ldm.optimize(tiny_model())
    exact, errors = images(pipe, steps=10), []
    for name, options in SPEED_PRESETS.items():
        got = images(ldm.optimize(pipe, preset=name), steps=10)
        done = pipe.optimizations
        assert torch.equal(got, images(ldm.optimize(pipe, **options._asdict()), steps=10))
        assert pipe.optimizations == done
        errors.append(float((got - exact).square().mean()))
    assert list(SPEED_PRESETS) == ["exact", "fast", "fastest"] and 0 == errors[0] < errors[1] < errors[2]


@torch.no_grad()
@pytest.mark.parametrize("config", [*UNETS.values(), DEEP], ids=[*UNETS, "deep"])
def test_the_shallow_evaluation_equals_the_full_one_for_the_same_input(config):
    net = ldm.optimize(make(config), kernels=False)
    x, t, cond = inputs(config, torch.float32)
    exact = net(x, t, cond)
    for branch in range(len(up_path(net))):
        ldm.optimize(net, kernels=False, reuse=2, branch=branch)
        assert torch.equal(net(x, t, cond), exact)  # a full evaluation
        # as if the features were of a slightly larger t: the same input must give the same output
        own, net.forward.progress.t = (net.forward, t + 1)
        assert torch.equal(own._shallow_evaluation(x, t, cond, own.progress.kept[0][0]), exact)
        assert torch.equal(net(x, t, cond), exact) and own.progress.steps == 1


@torch.no_grad()
def test_one_step_per_interval_is_full_under_guidance_and_in_the_next_run(monkeypatch):
    pipe = ldm.optimize(tiny_model(), reuse=3)
    made = record_evaluations(pipe.denoiser.net, monkeypatch)
    first = images(pipe)
    assert made == [FULL, SHALLOW, SHALLOW] * 2
    made.clear()
    assert torch.equal(images(pipe, steps=6), first)  # the previous run leaves no features
    assert made == [FULL, SHALLOW, SHALLOW] * 2
    made.clear()
    # t: a b | b c | c d | d, and each evaluation at a t has features of its own
    images(pipe, steps=4, sampler="heun")
    assert made.count(SHALLOW) >= 2 and made[0] == FULL


@torch.no_grad()
def test_two_calls_of_guidance_have_separate_features(monkeypatch):
    net = ldm.optimize(make(UNETS["sd"]), kernels=False, reuse=2)
    made = record_evaluations(net, monkeypatch)
    denoiser = Denoiser(net, NoiseSchedule.scaled_linear(1000, 0.00085, 0.012), "eps")
    x, _, cond = inputs(UNETS["sd"], torch.float32)
    grid = TimeGrid.make(denoiser.schedule, 4)
    apart = Cond(context=torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)))

    def guided(x, t):  # one condition after the other, as for conditions that cannot be batched
        return lerp(denoiser(x, t, apart), denoiser(x, t, cond), 2.0)

    SAMPLERS["ddim"](guided, x, grid)
    assert made == [FULL, FULL, SHALLOW, SHALLOW] * 2
    alone = []
    for c in (apart, cond):  # each call has the features of its own condition
        ldm.optimize(net, kernels=False, reuse=2)
        alone.append([denoiser(x, t, c) for t in grid.t[:2]])
    ldm.optimize(net, kernels=False, reuse=2)
    for t, a, b in zip(grid.t[:2], *alone, strict=True):
        assert torch.equal(guided(x, t).eps, lerp(a, b, 2.0).eps)


@torch.no_grad()
def test_features_of_other_conditions_shapes_and_later_times_are_not_reused(monkeypatch):
    net = ldm.optimize(make(UNETS["sd"]), kernels=False, reuse=4)
    made = record_evaluations(net, monkeypatch)
    x, t, cond = inputs(UNETS["sd"], torch.float32)
    other = Cond(context=cond.context + 0.5, context_mask=cond.context_mask)
    equal = Cond(context=cond.context.clone(), context_mask=cond.context_mask)
    for given in (
        (x, t, cond),
        (x, t - 1, equal),
        (x, t - 2, other),
        (x, t - 3, other),
        (x[:, :, :8], t - 3.5, other),
        (x, t, other),
    ):
        net(*given)
    assert made == [
        FULL,
        SHALLOW,
        FULL,
        SHALLOW,
        FULL,
        FULL,
    ]
    made.clear()
    net(x, t + 1, cond), net(x, t, cond)
    cond.context.mul_(2)  # the same tensor with other values
    net(x, t - 2, cond)
    assert made == [FULL, SHALLOW, FULL]
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        net(y, t - 3, cond).sum().backward()
    assert y.grad is not None and len(made) == 3
    for _ in range(2 * MOST_EVALUATIONS):  # at a constant t the number of kept features is bounded
        net(x, t - 4, cond)
    assert len(net.forward.progress.kept) == MOST_EVALUATIONS


@pytest.mark.parametrize("make_pipe", [tiny_karlo, tiny_stable])
def test_a_decoder_that_computes_its_condition_in_every_step_reuses_features(make_pipe):
    def draw(pipe):
        return pipe.text_to_image("a cat", n=1, seed=1, upsample=False, steps=4, progress=False).tensor

    pipe = make_pipe()
    exact = draw(pipe)
    assert (draw(ldm.optimize(pipe, reuse=2)) - exact).abs().max() > 1e-3
    assert torch.allclose(draw(ldm.optimize(pipe)), exact, atol=1e-4)


@torch.no_grad()
def test_the_error_of_reuse_falls_with_the_interval_and_with_the_blocks_that_are_computed():
    net = ldm.optimize(make(DEEP), kernels=False)
    denoiser = Denoiser(net, NoiseSchedule.scaled_linear(1000, 0.00085, 0.012), "eps")
    x, _, cond = inputs(DEEP, torch.float32)
    grid = TimeGrid.make(denoiser.schedule, 12)

    def run(**options):
        ldm.optimize(net, kernels=False, **options)
        return SAMPLERS["ddim"](denoiser.bind(cond), x, grid)

    exact = run()
    wrong = {key: rms(run(reuse=key[0], branch=key[1]), exact) for key in ((2, 0), (4, 0), (4, 6))}
    assert 0 < wrong[2, 0] < wrong[4, 0] < 0.2 and 0 < wrong[4, 6] < wrong[4, 0]


@torch.no_grad()
def test_a_transformer_reuses_what_its_middle_blocks_add():
    shape = {"in_channels": 3, "out_channels": 3, "width": 16, "depth": 6, "head_dim": 8, "context_dim": 8}
    net = randomise(build_network(DiTConfig(**shape)), 0)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 8, 8, generator=g), torch.tensor([500.0, 500.0])
    cond = Cond(context=torch.randn(2, 5, 8, generator=g))
    controlled = replace(cond, residuals=tuple(torch.randn(2, 16, 16, generator=g) for _ in range(2)))
    later = x + 0.05 * torch.randn(2, 3, 8, 8, generator=g)
    exact = {id(c): (net(x, t, c), net(later, t - 20, c)) for c in (cond, controlled)}
    for given in (cond, controlled):
        errors = []
        for branch in range(3):
            ldm.optimize(net, kernels=False, reuse=2, branch=branch)
            torch.testing.assert_close(net(x, t, given), exact[id(given)][0])
            made = net(later, t - 20, given)
            assert net.forward.progress.steps == 1
            errors.append(float((made - exact[id(given)][1]).square().mean()))
        assert 0 < errors[2] < errors[0]
        own = net.forward
        features = own.progress.kept[0][0]
        torch.testing.assert_close(own._shallow_evaluation(x, t, given, features), exact[id(given)][0])
        ldm.optimize(net)
    with pytest.raises(ValueError, match="branch: expected an integer from 0 to 2, so that one of the"):
        ldm.optimize(net, reuse=2, branch=3)


@torch.no_grad()
def test_a_model_with_exemplars_reuses_features_and_draws_the_same_layouts():
    pipe = tiny_exemplar_model()
    exact = images(pipe)
    reused = images(ldm.optimize(pipe, reuse=3))
    assert isinstance(pipe.denoiser.net.forward, DiTReuse)
    assert "forward" not in pipe.text.layout.__dict__
    assert 1e-4 < (reused - exact).abs().max() and (reused - exact).square().mean() < exact.var() / 4
    torch.testing.assert_close(images(ldm.optimize(pipe)), exact, atol=1e-3, rtol=0)  # none is left
    with pytest.raises(ValueError, match="merge and int8 act on a UNet"):
        ldm.optimize(pipe, merge=0.5)
    with pytest.raises(ValueError, match="reuse acts on a UNet or a diffusion transformer"):
        ldm.optimize(torch.nn.Linear(2, 2), reuse=2)


def test_merging_assigns_each_position_to_the_most_similar():
    # 7×5 has 12 positions in even rows and columns
    x = torch.randn(2, 35, 16, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 3 * x[0, 14]  # parallel vectors: row 0, column 1 is merged with row 2, column 4
    at, tokens = assign(x, (7, 5), 0.5)
    assert tokens == 35 - 17 and at[0, 1] == at[0, 14]
    assert all(len(row.unique()) == tokens and row.max() == tokens - 1 for row in at)
    mean = means(x, at, tokens)
    for b in range(2):
        for token in range(tokens):
            assert torch.allclose(mean[b, token], x[b, at[b] == token].mean(0), atol=1e-6)
    assert torch.equal(take(mean, at)[1, 7], mean[1, at[1, 7]])
    at, tokens = assign(x, (7, 5), 0.75)  # more than possible: all other positions
    assert tokens == 12 and at.max() == 11


@torch.no_grad()
def test_merging_equal_positions_changes_nothing():
    pairs = torch.randn(1, 6, 5, 32, generator=torch.Generator().manual_seed(0))
    # 12×10, with equal positions in each 2×2
    x = pairs.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    net = make(UNETS["sd"])
    attention = net.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    exact = attention(x)
    ldm.optimize(net, kernels=False, merge=0.75)
    seen = []
    attention.to_q.register_forward_pre_hook(lambda part, args: seen.append(args[0].shape[1]))
    size = merge._SIZE.set((12, 10))
    assert torch.allclose(attention(x), exact, atol=1e-5)
    merge._SIZE.reset(size)
    assert seen == [30]  # tokens


@torch.no_grad()
def test_merging_acts_at_the_largest_level_and_its_error_is_bounded():
    net = make(DEEP)
    args = inputs(DEEP, torch.float32)
    exact = net(*args)
    wrong = [rms(ldm.optimize(net, kernels=False, merge=ratio)(*args), exact) for ratio in (0.25, 0.5, 0.75)]
    merged = [
        name for name, part in net.named_modules() if type(part.__dict__.get("forward")).__name__ == "Merge"
    ]
    assert len(merged) == 5 and all(
        name.startswith(("down_blocks.1.", "up_blocks.1.")) and name.endswith("attn1") for name in merged
    )
    with attention_control(net, lambda name, p: None, of="self"):
        assert rms(net(*args), exact) < 1e-5  # a control reads every position
    for name in merged:  # the error is less than without these attentions, although positions differ
        net.get_submodule(name).forward = lambda x: torch.zeros_like(x)
    assert 0.01 < wrong[0] < wrong[1] < wrong[2] < rms(net(*args), exact)


@torch.no_grad()
def test_a_copy_computes_the_same_independently():
    net = ldm.optimize(make(DEEP), kernels=False, reuse=2, merge=0.5)
    x, t, cond = inputs(DEEP, torch.float32)
    expected = net(x, t, cond), net(x, t - 50, cond)
    other = copy.deepcopy(net)
    assert other.forward is not net.forward and other.forward.module is other
    assert torch.equal(other(x, t, cond), expected[0]) and torch.equal(other(x, t - 50, cond), expected[1])
    ldm.optimize(other, kernels=False)
    assert isinstance(net.forward, Reuse) and not torch.equal(other(x, t, cond), expected[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse": 0}, r"reuse: expected an integer of 1 \(no reuse\) or more"),
        ({"reuse": 2.5}, "got 2.5"),
        ({"reuse": True}, "got True"),
        ({"reuse": 2, "branch": 4}, "branch: expected an integer from 0 to 3"),
        ({"reuse": 2, "branch": -1}, "got -1"),
        ({"merge": 0.8}, "merge: expected a fraction of the positions from 0"),
        ({"merge": -0.1}, "got -0.1"),
        ({"preset": "faster"}, "preset 'faster': did you mean 'fast'.*exact, fast, fastest"),
        ({"preset": "fast", "reuse": 2, "merge": 0.5}, "given besides: reuse, merge"),
    ],
)
def test_wrong_values_are_refused_before_anything_changes(options, message):
    net = make(UNETS["sd"])
    with pytest.raises(ValueError, match=message):
        ldm.optimize(net, kernels=False, **options)
    assert type(net.conv_in) is torch.nn.Conv2d and "forward" not in net.__dict__
    with pytest.raises(ValueError, match="act on a UNet"):
        ldm.optimize(torch.nn.Linear(2, 2), merge=0.5)
