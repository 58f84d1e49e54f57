"""Noise schedules against the Markov chain, their formulas and diffusers' tables."""

import math

import pytest
import torch

from ldm.diffusion.schedule import NoiseSchedule

SCHEDULES = {
    "linear": NoiseSchedule.linear(1000),
    "scaled_linear": NoiseSchedule.scaled_linear(1000),
    "cosine": NoiseSchedule.cosine(1000),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_equals_the_markov_chain(name: str) -> None:
    """add_noise, affine in x0 and eps, has the mean and variance of q(x_t | x_0) computed step by step.

    Mean m ← sqrt(1 − beta)·m, variance v ← (1 − beta)·v + beta.
    """
    schedule = SCHEDULES[name]
    mean, var = 1.0, 0.0
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t, beta in enumerate(schedule.betas.tolist()):
        mean, var = math.sqrt(1 - beta) * mean, (1 - beta) * var + beta
        # 1000 roundings of 1e-16, with room
        assert float(schedule.add_noise(one, t, zero)) == pytest.approx(mean, rel=1e-10)
        assert float(schedule.add_noise(zero, t, one)) ** 2 == pytest.approx(var, rel=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_is_preserved_and_snr_decreases(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.linspace(0, 999, 5001, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-14)
    assert bool((schedule.snr(t).diff() < 0).all())


def test_integers_are_the_table_and_between_them_the_log_ratio_is_linear() -> None:
    schedule = NoiseSchedule.scaled_linear()
    alpha, sigma = schedule.alpha_sigma(torch.arange(1000))
    assert torch.equal(alpha, schedule.alphas_cumprod.sqrt()) and torch.equal(
        sigma, (1 - schedule.alphas_cumprod).sqrt()
    )
    a, s = schedule.alpha_sigma(torch.tensor([10.25], dtype=torch.float64))
    expected = 0.75 * (sigma[10] / alpha[10]).log() + 0.25 * (sigma[11] / alpha[11]).log()
    assert float((s / a).log()) == pytest.approx(float(expected), rel=1e-12)


def test_tables_against_their_formulas() -> None:
    betas = [
        (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2 for i in range(1000)
    ]
    bar = math.exp(sum(math.log1p(-b) for b in betas))
    assert float(NoiseSchedule.scaled_linear().alphas_cumprod[-1]) == pytest.approx(bar, rel=1e-10)
    cosine = NoiseSchedule.cosine(1000).alphas_cumprod
    ratio = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    # alpha_bar(u = 1/2): t = 499 is the 500th step
    assert float(cosine[499]) == pytest.approx(ratio, rel=1e-10)
    assert float(1 - cosine[999] / cosine[998]) == pytest.approx(0.999)


def test_schedules_by_name() -> None:
    for name, schedule in SCHEDULES.items():
        assert torch.equal(NoiseSchedule.make(name).alphas_cumprod, schedule.alphas_cumprod)
    own = NoiseSchedule.make("linear", 100, beta_start=1e-3, beta_end=0.1)
    assert torch.equal(own.alphas_cumprod, NoiseSchedule.linear(100, 1e-3, 0.1).alphas_cumprod)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        NoiseSchedule.make("cosin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cosine schedule has no beta_end"):
        NoiseSchedule.make("cosine", beta_end=0.1)


def test_time_inverts_alpha_sigma() -> None:
    schedule = NoiseSchedule.scaled_linear()
    t = torch.linspace(0, 999, 2341, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(schedule.time((sigma / alpha).log()), t, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="sigma/alpha must lie"):
        schedule.time(math.log(20.0))
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        schedule.zero_terminal_snr().time(math.log(1e9))


def test_diffusers_tables() -> None:
    from diffusers import DDPMScheduler

    for name, schedule, options in (
        ("linear", NoiseSchedule.linear(), {"beta_start": 1e-4, "beta_end": 0.02}),
        ("scaled_linear", NoiseSchedule.scaled_linear(), {"beta_start": 0.00085, "beta_end": 0.012}),
        ("squaredcos_cap_v2", NoiseSchedule.cosine(), {}),
    ):
        peer = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name, **options).alphas_cumprod.double()
        # diffusers multiplies 1000 factors in float32: a relative error of at most 1000·6e-8
        torch.testing.assert_close(schedule.alphas_cumprod, peer, rtol=6e-5, atol=0)


def test_zero_terminal_snr() -> None:
    schedule = NoiseSchedule.scaled_linear()
    zero = schedule.zero_terminal_snr()
    assert float(zero.alphas_cumprod[-1]) == 0 and float(zero.snr(999)) == 0
    assert float(zero.alphas_cumprod[0]) == pytest.approx(float(schedule.alphas_cumprod[0]), rel=1e-14)
    # sqrt(alpha_bar) is an affine function of its old value
    old, new = schedule.alphas_cumprod.sqrt(), zero.alphas_cumprod.sqrt()
    scale = new.diff() / old.diff()
    torch.testing.assert_close(scale, scale[:1].expand(999), rtol=1e-8, atol=0)
    with pytest.raises(ValueError, match="zero-terminal"):
        zero.alpha_sigma(998.5)


def test_add_noise_per_sample_and_dtype() -> None:
    schedule = NoiseSchedule.linear(100, 1e-3, 0.1)
    x0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 50, 99])
    noised = schedule.add_noise(x0, t, eps)
    assert noised.dtype == torch.float32
    for i in range(3):
        torch.testing.assert_close(
            noised[i : i + 1], schedule.add_noise(x0[i : i + 1], int(t[i]), eps[i : i + 1]), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule(torch.tensor([0.5, 0.6])), "decrease strictly"),
        (lambda: NoiseSchedule(torch.tensor([1.0, 0.6])), r"\[0, 1\)"),
        (lambda: NoiseSchedule(torch.ones(2, 2) / 2), "shape"),
        (lambda: NoiseSchedule.from_betas(torch.tensor([0.0, 0.1])), "betas"),
        (lambda: NoiseSchedule.linear(10).alpha_sigma(10), r"\[0, 9\]"),
        (lambda: NoiseSchedule.linear(10).alpha_sigma(-0.1), r"\[0, 9\]"),
        (
            lambda: NoiseSchedule.linear(10).add_noise(torch.zeros(2, 1), torch.zeros(3), torch.zeros(2, 1)),
            r"\(2,\)",
        ),
    ],
)
def test_wrong_input(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
