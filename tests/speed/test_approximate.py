"""Gains that change the result: how far, and that they can be taken away."""

from __future__ import annotations

import copy

import pytest
import torch
from test_optimize import UNETS, inputs, make, rms
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import lerp
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.layers.attention import attention_control
from ldm.models.unet import UNetConfig
from ldm.samplers import SAMPLERS
from ldm.speed.approximate import MOST_EVALUATIONS, Reuse, assign, means, rises, take

DEEP = UNetConfig(channels=(32, 32, 64), depth=(0, 1, 1), blocks=2, heads=4, context_dim=24)
PROMPTS = ["a red cat", "apple on blue background"]


def pictures(pipe, **options):
    return pipe.text_to_image(PROMPTS, **{"steps": 6, "guidance": 3.0, "progress": False, **options}).tensor


def whole_and_short(net, monkeypatch):
    """Names, as they come, of the evaluations that a network with `Reuse` makes."""
    made = []
    for name in ("_whole", "_shallow"):
        plain = getattr(Reuse, name)
        monkeypatch.setattr(
            Reuse, name, lambda self, *args, name=name, plain=plain: made.append(name) or plain(self, *args)
        )
    return made


@torch.no_grad()
def test_an_interval_of_one_and_a_ratio_of_nothing_are_exact_and_so_is_what_was_undone():
    pipe = ldm.optimize(tiny_model())
    exact, done = pictures(pipe), pipe.optimizations
    assert torch.equal(pictures(ldm.optimize(pipe, reuse=1, merge=0.0)), exact) and pipe.optimizations == done
    for options in ({"reuse": 2}, {"merge": 0.5}, {"reuse": 3, "branch": 1, "merge": 0.25}):
        assert not torch.equal(pictures(ldm.optimize(pipe, **options)), exact)
        assert sum("approximate" in line for line in pipe.optimizations) == len(options.keys() - {"branch"})
        assert not any("approximate" in line for line in ldm.optimize(pipe).optimizations)
        assert torch.equal(pictures(pipe), exact)
        assert all("forward" not in part.__dict__ for part in pipe.modules())


@torch.no_grad()
@pytest.mark.parametrize("config", [*UNETS.values(), DEEP], ids=[*UNETS, "deep"])
def test_the_short_evaluation_is_the_whole_one_where_the_input_is_the_same(config):
    net = ldm.optimize(make(config), kernels=False)
    x, t, cond = inputs(config, torch.float32)
    exact = net(x, t, cond)
    for branch in range(len(rises(net))):
        ldm.optimize(net, kernels=False, reuse=2, branch=branch)
        assert torch.equal(net(x, t, cond), exact)  # whole
        # as if the features were of a time just above: what enters is the same, so must be what leaves
        own, net.forward.t = (net.forward, t + 1)
        assert torch.equal(own._shallow(x, t, cond, own.kept[0][0]), exact)
        assert torch.equal(net(x, t, cond), exact) and own.steps == 1


@torch.no_grad()
def test_one_step_of_the_interval_is_whole_under_guidance_and_in_the_next_run(monkeypatch):
    pipe = ldm.optimize(tiny_model(), reuse=3)
    made = whole_and_short(pipe.denoiser.net, monkeypatch)
    first = pictures(pipe)
    assert made == ["_whole", "_shallow", "_shallow"] * 2
    made.clear()
    assert torch.equal(pictures(pipe, steps=6), first)  # nothing is left of the run before
    assert made == ["_whole", "_shallow", "_shallow"] * 2
    made.clear()
    # t: a b | b c | c d | d, each evaluation of a time with features of its own
    pictures(pipe, steps=4, sampler="heun")
    assert made.count("_shallow") >= 2 and made[0] == "_whole"


@torch.no_grad()
def test_two_calls_of_guidance_have_features_each(monkeypatch):
    net = ldm.optimize(make(UNETS["sd"]), kernels=False, reuse=2)
    made = whole_and_short(net, monkeypatch)
    denoiser = Denoiser(net, NoiseSchedule.scaled_linear(1000, 0.00085, 0.012), "eps")
    x, _, cond = inputs(UNETS["sd"], torch.float32)
    grid = TimeGrid.make(denoiser.schedule, 4)
    apart = Cond(context=torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)))

    def guided(x, t):  # one condition after the other, as where they cannot be joined
        return lerp(denoiser(x, t, apart), denoiser(x, t, cond), 2.0)

    SAMPLERS["ddim"](guided, x, grid)
    assert made == ["_whole", "_whole", "_shallow", "_shallow"] * 2
    alone = []
    for c in (apart, cond):  # each call's features are those of its own condition
        ldm.optimize(net, kernels=False, reuse=2)
        alone.append([denoiser(x, t, c) for t in grid.t[:2]])
    ldm.optimize(net, kernels=False, reuse=2)
    for t, a, b in zip(grid.t[:2], *alone, strict=True):
        assert torch.equal(guided(x, t).eps, lerp(a, b, 2.0).eps)


@torch.no_grad()
def test_features_of_other_conditions_shapes_and_later_times_are_not_reused(monkeypatch):
    net = ldm.optimize(make(UNETS["sd"]), kernels=False, reuse=4)
    made = whole_and_short(net, monkeypatch)
    x, t, cond = inputs(UNETS["sd"], torch.float32)
    other = Cond(context=cond.context.clone(), context_mask=cond.context_mask)
    for given in (
        (x, t, cond),
        (x, t - 1, cond),
        (x, t - 2, other),
        (x, t - 3, other),
        (x[:, :, :8], t - 3.5, other),
        (x, t, other),
    ):
        net(*given)
    assert made == ["_whole", "_shallow", "_whole", "_shallow", "_whole", "_whole"]
    made.clear()
    net(x, t + 1, cond), net(x, t, cond)
    cond.context.mul_(2)  # the same tensor, other numbers
    net(x, t - 2, cond)
    assert made == ["_whole", "_shallow", "_whole"]
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        net(y, t - 3, cond).sum().backward()
    assert y.grad is not None and len(made) == 3
    for _ in range(2 * MOST_EVALUATIONS):  # one time for ever: what is kept does not grow
        net(x, t - 4, cond)
    assert len(net.forward.kept) == MOST_EVALUATIONS


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


def test_merging_assigns_each_position_to_the_most_alike():
    # 7×5: 12 positions in even rows and columns
    x = torch.randn(2, 35, 16, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 3 * x[0, 14]  # alike but for length: row 0, column 1 goes to row 2, column 4
    at, tokens = assign(x, (7, 5), 0.5)
    assert tokens == 35 - 17 and at[0, 1] == at[0, 14]
    assert all(len(row.unique()) == tokens and row.max() == tokens - 1 for row in at)
    mean = means(x, at, tokens)
    for b in range(2):
        for token in range(tokens):
            assert torch.allclose(mean[b, token], x[b, at[b] == token].mean(0), atol=1e-6)
    assert torch.equal(take(mean, at)[1, 7], mean[1, at[1, 7]])
    at, tokens = assign(x, (7, 5), 0.75)  # more than there are: all that can be
    assert tokens == 12 and at.max() == 11


@torch.no_grad()
def test_merging_positions_that_are_the_same_changes_nothing():
    pairs = torch.randn(1, 6, 5, 32, generator=torch.Generator().manual_seed(0))
    # 12×10, all four of each 2×2 alike
    x = pairs.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    net = make(UNETS["sd"])
    attention = net.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    exact = attention(x)
    ldm.optimize(net, kernels=False, merge=0.75)
    attention.forward.size = (12, 10)
    seen = []
    attention.to_q.register_forward_pre_hook(lambda part, args: seen.append(args[0].shape[1]))
    assert torch.allclose(attention(x), exact, atol=1e-5)
    assert seen == [30]  # tokens


@torch.no_grad()
def test_merging_acts_where_positions_are_most_and_stays_within_what_is_stated():
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
        assert rms(net(*args), exact) < 1e-5  # who looks sees every position
    for name in merged:  # less is lost than these attentions give, even on positions that are not alike
        net.get_submodule(name).forward = lambda x: torch.zeros_like(x)
    assert 0.01 < wrong[0] < wrong[1] < wrong[2] < rms(net(*args), exact)


@torch.no_grad()
def test_a_copy_computes_the_same_and_by_itself():
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
        ({"reuse": 0}, "reuse: expected a whole number of steps, 1 or more"),
        ({"reuse": 2.5}, "got 2.5"),
        ({"reuse": True}, "got True"),
        ({"reuse": 2, "branch": 4}, "branch: expected a whole number from 0 to 3"),
        ({"reuse": 2, "branch": -1}, "got -1"),
        ({"merge": 0.8}, "merge: expected a part of the positions from 0"),
        ({"merge": -0.1}, "got -0.1"),
    ],
)
def test_wrong_values_are_refused_before_anything_changes(options, message):
    net = make(UNETS["sd"])
    with pytest.raises(ValueError, match=message):
        ldm.optimize(net, kernels=False, **options)
    assert type(net.conv_in) is torch.nn.Conv2d and "forward" not in net.__dict__
    with pytest.raises(ValueError, match="act on a UNet"):
        ldm.optimize(torch.nn.Linear(2, 2), merge=0.5)
