"""Every pair of guidance functions is a consistent denoiser, and equals its closed form if it has one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.analysis.oracle import AnalyticNet, gaussian
from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import clip_x0, dynamic_threshold, keep_known
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import apg, autoguidance, between, cfg, compose, gradient, perp_neg, switch
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import SAMPLERS

SCHEDULE = NoiseSchedule.scaled_linear()
DIMS = 6
RATIO = float((1 / SCHEDULE.snr(400)).sqrt())
TIMES = torch.tensor([400.0, 250.0, 700.0])
MASK, KNOWN = torch.tensor([0.0, 0, 1, 1, 1, 1]), torch.linspace(-0.5, 0.5, DIMS, dtype=torch.float64)[None]
DIRECTION = torch.linspace(-1, 2, DIMS, dtype=torch.float64)


def cond(*values: float) -> Cond:
    return Cond(
        pooled=(
            torch.tensor([values], dtype=torch.float64)
            if len(values) == DIMS
            else torch.full((1, DIMS), values[0], dtype=torch.float64)
        )
    )


C, U, OTHER = cond(1.5), cond(0.0), cond(1, -1, 0.5, 0, 2, -0.5)


def make() -> Denoiser:
    return Denoiser(AnalyticNet(gaussian(dims=DIMS), SCHEDULE, "v"), SCHEDULE, "v")


def state(n: int = 3) -> Tensor:
    return 1.5 * torch.randn(n, DIMS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def classifier(x: Tensor, t: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid((x * DIRECTION).sum(1))


def similarity(x0: Tensor, t: Tensor) -> Tensor:
    """Return a score like that of CLIP guidance: a nonlinear tower, and the cosine with an embedding."""
    # 0.05 keeps tanh from saturating
    embedding = torch.tanh(0.05 * torch.stack([x0.flatten(1).roll(k, 1).cumsum(1) for k in range(3)]).sum(0))
    return 3 * torch.nn.functional.cosine_similarity(embedding, DIRECTION[None], dim=1)


# functions that build a DenoiseFn from a denoiser
MAKERS: dict[str, Callable[[Denoiser], DenoiseFn]] = {
    "cfg": lambda d: cfg(d, C, U, 4.0),
    "cfg interval": lambda d: cfg(d, C, U, 4.0, interval=(0.1, RATIO)),
    "cfg rescale": lambda d: cfg(d, C, U, 4.0, rescale=0.7),
    "compose": lambda d: compose(d, [(C, 3.0), (OTHER, -1.0)], U),
    "perp_neg": lambda d: perp_neg(d, C, [(OTHER, 0.8)], U, 4.0),
    "apg": lambda d: apg(d, C, U, 4.0, eta=0.2, norm=2.0),
    "autoguidance": lambda d: autoguidance(d.bind(C), d.bind(OTHER), 2.0),
}
# functions that wrap a DenoiseFn, each with the same at a strength that changes nothing, if there is one
Wrapper = Callable[[DenoiseFn], DenoiseFn]
WRAPPERS: dict[str, tuple[Wrapper, Wrapper | None]] = {
    "clip_x0": (lambda fn: clip_x0(fn, SCHEDULE, 0.8), lambda fn: clip_x0(fn, SCHEDULE, 1e6)),
    "dynamic_threshold": (lambda fn: dynamic_threshold(fn, SCHEDULE, 0.7), None),
    "classifier": (
        lambda fn: gradient(fn, SCHEDULE, classifier, 2.0),
        lambda fn: gradient(fn, SCHEDULE, classifier, 0.0),
    ),
    "clip guidance": (
        lambda fn: gradient(fn, SCHEDULE, similarity, 2.0, of_x0=True),
        lambda fn: gradient(fn, SCHEDULE, similarity, 0.0, of_x0=True),
    ),
    "autoguidance": (
        lambda fn: autoguidance(fn, make().bind(OTHER), 1.7),
        lambda fn: autoguidance(fn, make().bind(OTHER), 1.0),
    ),
    "interval": (
        lambda fn: between(fn, make().bind(C), SCHEDULE, 0.1, RATIO),
        lambda fn: between(fn, make().bind(C), SCHEDULE, 0.0, 1e9),
    ),
    "keep_known": (
        lambda fn: keep_known(fn, SCHEDULE, KNOWN, MASK),
        lambda fn: keep_known(fn, SCHEDULE, KNOWN, MASK * 0 + 1),
    ),
    "switch": (lambda fn: switch(fn, make().bind(C), 300), lambda fn: switch(fn, make().bind(C), 0)),
}
PAIRS = [
    (f"{wrapper}({maker})", WRAPPERS[wrapper], MAKERS[maker]) for wrapper in WRAPPERS for maker in MAKERS
] + [
    (f"{outer}({inner}(cfg))", WRAPPERS[outer], lambda d, inner=inner: WRAPPERS[inner][0](MAKERS["cfg"](d)))
    for outer in WRAPPERS
    for inner in WRAPPERS
]


@pytest.mark.parametrize(("name", "wrapper", "maker"), PAIRS, ids=[name for name, *_ in PAIRS])
def test_a_pair_is_a_denoiser(
    name: str, wrapper: tuple[Wrapper, Wrapper | None], maker: Callable[[Denoiser], DenoiseFn]
) -> None:
    """A pair keeps x_t = alpha·x0 + sigma·eps and treats samples independently.

    With a neutral strength the outer function leaves the inner one unchanged.
    """
    x, strong, neutral = state(), *wrapper
    fn = strong(maker(make()))
    times = TIMES[:1].expand(3) if "switch" in name else TIMES  # switch needs one t per batch
    d = fn(x, times)
    alpha, sigma = SCHEDULE.alpha_sigma_like(times, x)
    torch.testing.assert_close(alpha * d.x0 + sigma * d.eps, x, rtol=0, atol=1e-12)
    assert not d.x0.requires_grad and d.x0.dtype == torch.float64
    for i in range(3):
        alone = fn(x[i : i + 1], times[i : i + 1])
        torch.testing.assert_close(alone.x0, d.x0[i : i + 1], rtol=1e-12, atol=1e-12)
    inner = maker(make())(x, times)
    if neutral is not None:  # up to rounding, as eps is derived again
        torch.testing.assert_close(neutral(maker(make()))(x, times).x0, inner.x0, rtol=0, atol=1e-12)
    # the others change only values beyond their limits; a clamp that is active everywhere has no gradient
    if (
        name.startswith(("classifier", "clip guidance", "autoguidance"))
        and name != "clip guidance(clip_x0(cfg))"
    ):
        assert bool(((d.x0 - inner.x0).abs().amax(1) > 1e-6).all())


@pytest.mark.parametrize("maker", MAKERS)
def test_the_outermost_constraint_holds(maker: str) -> None:
    x, fn = 3 * state(), MAKERS[maker](make())
    for inner in WRAPPERS:
        if inner == "switch":
            continue
        wrapped = WRAPPERS[inner][0](fn)
        assert float(clip_x0(wrapped, SCHEDULE, 0.8)(x, TIMES).x0.abs().max()) <= 0.8
        assert float(dynamic_threshold(wrapped, SCHEDULE, 0.7)(x, TIMES).x0.abs().max()) <= 1.0
        kept = keep_known(wrapped, SCHEDULE, KNOWN, MASK)(x, TIMES).x0
        assert torch.equal(kept[:, :2], KNOWN[:, :2].expand(3, 2)) and torch.equal(
            kept[:, 2:], wrapped(x, TIMES).x0[:, 2:]
        )


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_pair_samples(maker: str, wrapper: str) -> None:
    fn = WRAPPERS[wrapper][0](MAKERS[maker](make()))
    out = SAMPLERS["dpmpp_2m"](fn, state(2), TimeGrid.make(SCHEDULE, 4))
    assert torch.isfinite(out).all() and not out.requires_grad


def close(a: Denoised, b: Denoised) -> None:
    torch.testing.assert_close(a.x0, b.x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.eps, b.eps, rtol=1e-10, atol=1e-10)


def test_combined_extrapolations_have_closed_forms() -> None:
    """Guidance extrapolates along straight lines, so a combination of two has a closed form."""
    d, x = make(), state()
    plain = d(x, TIMES, U)
    # u + 1.5·4·(c − u)
    close(autoguidance(cfg(d, C, U, 4.0), d.bind(U), 1.5)(x, TIMES), cfg(d, C, U, 6.0)(x, TIMES))
    # 1 + 2·(3 − 1)
    close(autoguidance(cfg(d, C, U, 3.0), cfg(d, C, U, 1.0), 2.0)(x, TIMES), cfg(d, C, U, 5.0)(x, TIMES))
    both = compose(d, [(C, 2.0), (OTHER, 3.0)], U)(x, TIMES)
    a, b = cfg(d, C, U, 2.0)(x, TIMES), cfg(d, OTHER, U, 3.0)(x, TIMES)
    close(both, Denoised(a.x0 + b.x0 - plain.x0, a.eps + b.eps - plain.eps))
    close(perp_neg(d, C, [], U, 4.0)(x, TIMES), cfg(d, C, U, 4.0)(x, TIMES))
    close(apg(d, C, U, 4.0, eta=1.0)(x, TIMES), cfg(d, C, U, 4.0)(x, TIMES))


def test_gradients_add_and_commute() -> None:
    """A classifier of the noisy state moves eps by −scale·sigma·gradient; two of them add in either order."""
    d, x = make(), state()

    def steep(x: Tensor, t: Tensor) -> Tensor:
        return -x.square().sum(1)

    inner = cfg(d, C, U, 4.0)
    _, sigma = SCHEDULE.alpha_sigma_like(TIMES, x)
    slope = torch.sigmoid(-(x * DIRECTION).sum(1, keepdim=True)) * DIRECTION
    one = gradient(inner, SCHEDULE, classifier, 2.0)
    torch.testing.assert_close(
        one(x, TIMES).eps, inner(x, TIMES).eps - 2 * sigma * slope, rtol=1e-10, atol=1e-10
    )
    two = gradient(one, SCHEDULE, steep, 0.5)(x, TIMES)
    close(two, gradient(gradient(inner, SCHEDULE, steep, 0.5), SCHEDULE, classifier, 2.0)(x, TIMES))
    # −0.5·sigma·(−2x)
    torch.testing.assert_close(
        two.eps, inner(x, TIMES).eps - 2 * sigma * slope + sigma * x, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("maker", MAKERS)
def test_clip_guidance_differentiates_through_everything_inside(maker: str) -> None:
    """The gradient through the network and the guidance around it equals central differences."""
    x, t = state(1), TIMES[:1]
    inner = MAKERS[maker](make())
    moved = gradient(inner, SCHEDULE, similarity, 1.0, of_x0=True)(x, t)
    _, sigma = SCHEDULE.alpha_sigma(t)
    for i in range(DIMS):
        step = torch.zeros_like(x)
        step[0, i] = 1e-5
        difference = (similarity(inner(x + step, t).x0, t) - similarity(inner(x - step, t).x0, t)) / 2e-5
        # error of central differences: 1e-10 by curvature, 1e-16/1e-5 by rounding
        torch.testing.assert_close(
            (inner(x, t).eps - moved.eps)[0, i], (sigma * difference)[0], rtol=0, atol=1e-8
        )


def test_between_chooses_per_sample_and_evaluates_only_what_is_needed() -> None:
    d, plain = make(), make()
    fn = between(apg(d, C, U, 4.0), plain.bind(C), SCHEDULE, 0.1, RATIO * 1.001)
    x, out = state(), fn(state(), TIMES)
    # t = 400 and 250 are inside
    torch.testing.assert_close(out.x0[:2], apg(make(), C, U, 4.0)(x, TIMES).x0[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.x0[2:], make()(x, TIMES, C).x0[2:], rtol=1e-12, atol=1e-12)
    d.net.calls = plain.net.calls = 0
    fn(x, torch.tensor(900.0))
    assert (d.net.calls, plain.net.calls) == (0, 1)
    fn(x, torch.tensor(300.0))
    assert (d.net.calls, plain.net.calls) == (1, 1)
    with pytest.raises(ValueError, match="low < high"):
        between(fn, fn, SCHEDULE, 2.0, 1.0)


def test_scales_one_and_zero_are_exactly_one_model_at_one_evaluation() -> None:
    x, d = state(), make()
    kinds: list[tuple[Callable[[], DenoiseFn], Cond]] = [
        (lambda: cfg(d, C, U, 1.0), C),
        (lambda: cfg(d, C, U, 0.0), U),
        (lambda: cfg(d, C, U, 1.0, rescale=0.7, interval=(0.1, RATIO)), C),
        (lambda: compose(d, [(C, 1.0)], U), C),
        (lambda: compose(d, [(C, 1.0), (OTHER, 0.0)], U), C),
        (lambda: compose(d, [(C, 0.0), (OTHER, 0.0)], U), U),
        (lambda: perp_neg(d, C, [(OTHER, 0.5)], U, 0.0), U),
        (lambda: perp_neg(d, C, [(OTHER, 0.0)], U, 1.0), C),
        (lambda: apg(d, C, U, 1.0), C),
        (lambda: autoguidance(d.bind(C), d.bind(U), 1.0), C),
        (lambda: autoguidance(d.bind(C), d.bind(U), 0.0), U),
        (lambda: gradient(d.bind(C), SCHEDULE, classifier, 0.0), C),
    ]
    for i, (kind, which) in enumerate(kinds):
        expected, d.net.calls = d(x, TIMES, which), 0
        found = kind()(x, TIMES)
        assert d.net.calls == 1, i
        assert torch.equal(found.x0, expected.x0) and torch.equal(found.eps, expected.eps), i


def test_weights_that_sum_to_one_skip_the_unconditional_model() -> None:
    sizes: list[int] = []
    d = make()
    d.net.register_forward_pre_hook(lambda net, inputs: sizes.append(len(inputs[0])))
    compose(d, [(C, 0.25), (OTHER, 0.75)], U)(state(), TIMES)
    compose(d, [(C, 0.25), (OTHER, 1.75)], U)(state(), TIMES)
    assert sizes == [6, 9]


def test_perp_neg_and_apg_at_pure_noise() -> None:
    """At alpha 0 (zero terminal SNR) guidance of x0 is defined, and eps derived from it is x_t."""
    zero = SCHEDULE.zero_terminal_snr()
    d, x = Denoiser(AnalyticNet(gaussian(dims=DIMS), zero, "v"), zero, "v"), state()
    for fn in (
        perp_neg(d, C, [(OTHER, 0.8)], U, 4.0),
        apg(d, C, U, 4.0),
        compose(d, [(C, 2.0), (OTHER, 1.0)], U),
    ):
        out = fn(x, torch.tensor(999.0))
        assert torch.isfinite(out.x0).all()
        torch.testing.assert_close(out.eps, x, rtol=0, atol=1e-12)
