"""Each kind of guidance against its formula, and at the scales where it is a plain model."""

import pytest
import torch
from torch import Tensor

from ldm.analysis.oracle import AnalyticNet, gaussian
from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import clip_x0
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import apg, autoguidance, cfg, compose, gradient, perp_neg, switch
from ldm.diffusion.interfaces import Denoised
from ldm.diffusion.prediction import PREDICTIONS, target
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import SAMPLERS

SCHEDULE = NoiseSchedule.scaled_linear()
T = torch.tensor(400.0)


def conds(dims: int = 6, n: int = 1) -> tuple[Cond, Cond]:
    return Cond(pooled=torch.full((n, dims), 1.5)), Cond(pooled=torch.zeros(n, dims))


def make(prediction: str = "eps", dims: int = 6) -> Denoiser:
    return Denoiser(AnalyticNet(gaussian(dims=dims), SCHEDULE, prediction), SCHEDULE, prediction)  # type: ignore[arg-type]


def state(n: int = 3, dims: int = 6) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_scales_one_and_zero_are_one_model_at_one_evaluation() -> None:
    denoiser, x = make(), state()
    cond, uncond = conds()
    for scale, plain in ((1.0, cond), (0.0, uncond)):
        denoiser.net.calls = 0
        guided = cfg(denoiser, cond, uncond, scale)(x, T)
        assert denoiser.net.calls == 1
        expected = denoiser(x, T, plain)
        assert torch.equal(guided.x0, expected.x0) and torch.equal(guided.eps, expected.eps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_formula_in_one_batch(prediction: str) -> None:
    denoiser, x = make(prediction), state()
    cond, uncond = conds()
    guided = cfg(denoiser, cond, uncond, 7.5)(x, T)
    assert denoiser.net.calls == 1
    a, b = denoiser(x, T, uncond), denoiser(x, T, cond)
    torch.testing.assert_close(guided.eps, a.eps + 7.5 * (b.eps - a.eps), rtol=1e-12, atol=1e-12)
    alpha, sigma = SCHEDULE.alpha_sigma(T)
    torch.testing.assert_close(alpha * guided.x0 + sigma * guided.eps, x, rtol=0, atol=1e-11)


def test_conditions_that_cannot_be_joined_take_two_calls() -> None:
    denoiser, x = make(), state()
    cond, _ = conds()
    guided = cfg(denoiser, cond, Cond(), 3.0)(x, T)
    assert denoiser.net.calls == 2
    a, b = denoiser(x, T, Cond()), denoiser(x, T, cond)
    torch.testing.assert_close(guided.x0, a.x0 + 3 * (b.x0 - a.x0), rtol=1e-12, atol=1e-12)


def test_contexts_of_different_lengths_go_in_one_masked_batch() -> None:
    class Mean(torch.nn.Module):
        calls = 0

        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            self.calls += 1
            mask = (
                torch.ones(cond.context.shape[:2], dtype=torch.bool)
                if cond.context_mask is None
                else cond.context_mask
            )
            mean = (cond.context * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, D)
            return x * 0 + mean

    denoiser, x = Denoiser(Mean(), SCHEDULE, "eps"), state(2, 4)
    cond, uncond = Cond(context=torch.rand(1, 7, 4).double()), Cond(context=torch.rand(1, 3, 4).double())
    guided = cfg(denoiser, cond, uncond, 2.0)(x, torch.tensor([400.0, 300.0]))
    assert denoiser.net.calls == 1
    expected = (2 * cond.context.mean(1) - uncond.context.mean(1)).expand(2, 4)
    torch.testing.assert_close(guided.eps, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rescale_gives_the_conditional_standard_deviation(prediction: str) -> None:
    denoiser, x = make(prediction, 500), state(3, 500)
    cond = Cond(pooled=torch.linspace(-2, 2, 500, dtype=torch.float64)[None])
    uncond = Cond(pooled=torch.zeros(1, 500))
    alpha, sigma = SCHEDULE.alpha_sigma_like(T, x)

    def std(d: Denoised) -> Tensor:
        return target(d.x0, d.eps, alpha, sigma, prediction).std(1)

    plain, full, half = (cfg(denoiser, cond, uncond, 7.5, rescale=r)(x, T) for r in (0.0, 1.0, 0.5))
    torch.testing.assert_close(std(full), std(denoiser(x, T, cond)), rtol=1e-10, atol=0)
    torch.testing.assert_close(half.x0, (plain.x0 + full.x0) / 2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alpha * full.x0 + sigma * full.eps, x, rtol=0, atol=1e-10)


def test_rescale_equals_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    denoiser, x = make("eps"), state()
    cond, uncond = conds()
    a, b = denoiser(x, T, uncond).eps, denoiser(x, T, cond).eps
    expected = rescale_noise_cfg(a + 7.5 * (b - a), b, guidance_rescale=0.7)
    torch.testing.assert_close(
        cfg(denoiser, cond, uncond, 7.5, rescale=0.7)(x, T).eps, expected, rtol=1e-12, atol=1e-12
    )


def test_interval_is_conditional_outside() -> None:
    denoiser, x = make(), state()
    cond, uncond = conds()
    ratio = float((1 / SCHEDULE.snr(T)).sqrt())
    inside = cfg(denoiser, cond, uncond, 5.0, interval=(0.0, ratio * 1.01))(x, T)
    outside = cfg(denoiser, cond, uncond, 5.0, interval=(0.0, ratio * 0.99))(x, T)
    assert torch.equal(inside.x0, cfg(denoiser, cond, uncond, 5.0)(x, T).x0)
    assert torch.equal(outside.x0, denoiser(x, T, cond).x0)


def test_switch() -> None:
    def constant(value: float) -> object:
        return lambda x, t: Denoised(x * 0 + value, x)

    fn = switch(constant(1.0), constant(2.0), below=100)  # type: ignore[arg-type]
    x = state()
    assert (
        float(fn(x, torch.tensor(100.0)).x0[0, 0]) == 1
        and float(fn(x, torch.tensor([99.0] * 3)).x0[0, 0]) == 2
    )
    with pytest.raises(ValueError, match="one t"):
        fn(x, torch.tensor([99.0, 100, 101]))


def test_wrong_input() -> None:
    denoiser = make()
    with pytest.raises(ValueError, match="rescale"):
        cfg(denoiser, *conds(), 2.0, rescale=1.5)
    with pytest.raises(ValueError, match="interval"):
        cfg(denoiser, *conds(), 2.0, interval=(2.0, 1.0))


def test_the_interval_applies_per_sample() -> None:
    denoiser, x = make(), state(2)
    cond, uncond = conds()
    t = torch.tensor([100.0, 900.0])
    ratio = float((1 / SCHEDULE.snr(500)).sqrt())
    guided = cfg(denoiser, cond, uncond, 5.0, interval=(0.0, ratio))(x, t)
    torch.testing.assert_close(
        guided.x0[:1], cfg(denoiser, cond, uncond, 5.0)(x, t).x0[:1], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(guided.x0[1:], denoiser(x, t, cond).x0[1:], rtol=1e-12, atol=1e-12)


def test_compose_of_one_is_cfg_and_weights_add() -> None:
    denoiser, x = make(), state()
    cond, uncond = conds()
    one = compose(denoiser, [(cond, 4.0)], uncond)(x, T)
    torch.testing.assert_close(one.x0, cfg(denoiser, cond, uncond, 4.0)(x, T).x0, rtol=1e-12, atol=1e-12)
    denoiser.net.calls = 0
    twice = compose(denoiser, [(cond, 3.0), (cond, 1.0)], uncond)(x, T)
    assert denoiser.net.calls == 1
    torch.testing.assert_close(twice.eps, one.eps, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="at least one"):
        compose(denoiser, [], uncond)


def test_perp_neg_ignores_a_negative_along_the_prompt() -> None:
    """A negative prompt parallel to the prompt changes nothing; an orthogonal one is subtracted in full."""
    denoiser, x = make(dims=2), state(3, 2)
    uncond = Cond(pooled=torch.zeros(1, 2, dtype=torch.float64))
    parallel, orthogonal = (
        Cond(pooled=torch.tensor([v], dtype=torch.float64)) for v in ([1.0, 0.0], [0.0, 1.0])
    )
    plain = cfg(denoiser, parallel, uncond, 6.0)(x, T)
    same = perp_neg(denoiser, parallel, [(parallel, 0.7)], uncond, 6.0)(x, T)
    torch.testing.assert_close(same.eps, plain.eps, rtol=0, atol=1e-12)
    other = perp_neg(denoiser, parallel, [(orthogonal, 0.5)], uncond, 6.0)(x, T)
    negative = denoiser(x, T, orthogonal).eps - denoiser(x, T, uncond).eps
    torch.testing.assert_close(other.eps, plain.eps - 6.0 * 0.5 * negative, rtol=0, atol=1e-12)
    alpha, sigma = SCHEDULE.alpha_sigma(T)
    torch.testing.assert_close(alpha * other.x0 + sigma * other.eps, x, rtol=0, atol=1e-12)


def test_apg_limits() -> None:
    denoiser, x = make(), state()
    cond, uncond = conds()
    plain, c = cfg(denoiser, cond, uncond, 5.0)(x, T), denoiser(x, T, cond)
    torch.testing.assert_close(
        apg(denoiser, cond, uncond, 5.0, eta=1.0)(x, T).x0, plain.x0, rtol=1e-10, atol=1e-10
    )
    projected = apg(denoiser, cond, uncond, 5.0)(x, T)
    moved = projected.x0 - c.x0
    torch.testing.assert_close((moved * c.x0).sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)
    bounded = apg(denoiser, cond, uncond, 5.0, eta=1.0, norm=0.01)(x, T).x0 - c.x0
    torch.testing.assert_close(bounded.norm(dim=1), torch.full((3,), 4 * 0.01, dtype=torch.float64))


def test_autoguidance_formula() -> None:
    good, bad, x = make().bind(conds()[0]), make().bind(conds()[1]), state()
    d = autoguidance(good, bad, 2.0)(x, T)
    torch.testing.assert_close(d.x0, 2 * good(x, T).x0 - bad(x, T).x0, rtol=1e-12, atol=1e-12)
    assert torch.equal(autoguidance(good, bad, 1.0)(x, T).x0, good(x, T).x0)


def test_classifier_guidance_gives_the_posterior() -> None:
    """With the exact log p(y | x_t) the guided x0 is E[x0 | x_t, y], here in closed form.

    The data are N(m, s²), and y is x0 plus noise of standard deviation r.
    """
    m, s, r, y = 0.5, 0.8, 0.6, 1.3
    denoiser, x = make(), state()
    alpha, sigma = (float(v) for v in SCHEDULE.alpha_sigma(T))
    post_var = 1 / (1 / s**2 + alpha**2 / sigma**2)  # of x0 given x_t

    def log_prob(x_t: Tensor, t: Tensor) -> Tensor:
        mean = post_var * (m / s**2 + alpha * x_t / sigma**2)
        return (-0.5 * (y - mean) ** 2 / (post_var + r**2)).sum(1)

    guided = gradient(denoiser.bind(Cond()), SCHEDULE, log_prob)(x, T)
    exact = (m / s**2 + alpha * x / sigma**2 + y / r**2) / (1 / s**2 + alpha**2 / sigma**2 + 1 / r**2)
    torch.testing.assert_close(guided.x0, exact, rtol=0, atol=1e-10)
    assert not guided.x0.requires_grad

    def of_x0(x0: Tensor, t: Tensor) -> Tensor:
        return (-0.5 * (y - x0) ** 2 / (post_var + r**2)).sum(1)

    through = gradient(denoiser.bind(Cond()), SCHEDULE, of_x0, of_x0=True)(x, T)
    # here x0 is the posterior mean, so both gradients are equal
    torch.testing.assert_close(through.x0, exact, rtol=0, atol=1e-10)
    zero = SCHEDULE.zero_terminal_snr()
    fn = gradient(gaussian(dims=6).denoise(zero), zero, log_prob)
    with pytest.raises(ValueError, match="alpha 0"):
        fn(x, torch.tensor(999.0))
    with torch.no_grad():
        assert torch.isfinite(gradient(denoiser.bind(Cond()), SCHEDULE, log_prob)(x, T).x0).all()


def test_wrappers_compose() -> None:
    denoiser, x = make(), 3 * state()
    cond, uncond = conds()
    fn = clip_x0(autoguidance(cfg(denoiser, cond, uncond, 4.0), make().bind(uncond), 1.5), SCHEDULE, 1.0)
    out = SAMPLERS["dpmpp_2m"](fn, x, TimeGrid.make(SCHEDULE, 5))
    assert float(out.abs().max()) <= 1.0
