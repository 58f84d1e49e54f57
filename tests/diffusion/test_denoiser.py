"""The denoiser: predictions, precision, learned variance and rounding of t."""

import pytest
import torch
from torch import Tensor, nn

from ldm.analysis.oracle import AnalyticNet, gaussian
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.layers.embeddings import one_time


class Stub(nn.Module):
    """A network that records its arguments and returns its input, scaled."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen = (x, t, cond)
        return torch.cat([self.weight * x] * self.channels, dim=1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_of_a_perfect_network_gives_the_same_x0_and_eps(prediction: str) -> None:
    schedule, data = NoiseSchedule.scaled_linear(), gaussian()
    x, t = (
        torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None],
        torch.tensor([0, 17.5, 400, 999, 3], dtype=torch.float64),
    )
    d = Denoiser(AnalyticNet(data, schedule, prediction), schedule, prediction)(x, t, Cond())
    exact = data.denoise(schedule)(x, t)
    torch.testing.assert_close(d.x0, exact.x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(d.eps, exact.eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("quantize", [False, True])
def test_one_time_reaches_the_network_as_one_number(quantize: bool) -> None:
    denoiser = Denoiser(Stub(), NoiseSchedule.scaled_linear(), "eps", quantize=quantize)
    denoiser(torch.randn(3, 1, 4), torch.tensor(100.4))
    time = denoiser.net.seen[1]
    assert time.shape == (3,) and time.stride(0) == 0 and one_time(time).tolist() == time[:1].tolist()
    denoiser(torch.randn(3, 1, 4), torch.tensor([1.0, 2.0, 3.0]))
    assert one_time(denoiser.net.seen[1]).tolist() == [1.0, 2.0, 3.0]


def test_half_precision_network_keeps_float32_state_and_float64_tables() -> None:
    schedule = NoiseSchedule.scaled_linear()
    denoiser = Denoiser(Stub(), schedule, "eps").to(torch.bfloat16)
    x = torch.randn(2, 1, 4)
    d = denoiser(
        x,
        torch.tensor(100.5),
        Cond(context=torch.randn(1, 3, 5), context_mask=torch.ones(1, 3, dtype=torch.bool)),
    )
    seen_x, seen_t, seen_cond = denoiser.net.seen
    assert (seen_x.dtype, seen_t.dtype, seen_cond.context.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )
    assert seen_cond.context_mask.dtype == torch.bool and seen_cond.context.shape == (2, 3, 5)
    assert seen_t.shape == (2,) and float(seen_t[0]) == 100.5
    assert d.x0.dtype == d.eps.dtype == torch.float32
    assert denoiser.schedule.alphas_cumprod.dtype == torch.float64
    alpha, sigma = schedule.alpha_sigma(100.5)
    # x is used at float32 in x0 = (x − sigma·eps)/alpha: bf16 rounding of x would show at 4e-3
    torch.testing.assert_close(alpha.float() * d.x0 + sigma.float() * d.eps, x, rtol=0, atol=1e-6)


def test_learned_variance_is_split_off() -> None:
    d = Denoiser(Stub(2), NoiseSchedule.linear(), "eps", learned_var=True)(
        torch.full((1, 3, 2), 0.8), 5, Cond()
    )
    assert d.eps.shape == (1, 3, 2)
    torch.testing.assert_close(d.var_frac, torch.full((1, 3, 2), (0.4 + 1) / 2))


def test_quantize_rounds_only_what_the_network_gets() -> None:
    schedule = NoiseSchedule.linear()
    denoiser = Denoiser(Stub(), schedule, "eps", quantize=True)
    x = torch.ones(1, 1)
    d = denoiser(x, 10.3, Cond())
    assert float(denoiser.net.seen[1]) == 10
    torch.testing.assert_close(d.x0, Denoiser(Stub(), schedule, "eps")(x, 10.3, Cond()).x0)


def test_wrong_input() -> None:
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match="zero-terminal"):
        Denoiser(Stub(), schedule.zero_terminal_snr(), "eps")
    with pytest.raises(ValueError, match="did you mean 'v'|Choices"):
        Denoiser(Stub(), schedule, "velocity")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"returned \(1, 4, 2\), expected \(1, 2, 2\)"):
        Denoiser(Stub(2), schedule, "eps")(torch.ones(1, 2, 2), 0, Cond())
    with pytest.raises(ValueError, match="cannot serve 3"):
        Denoiser(Stub(), schedule, "eps")(torch.ones(3, 1), 0, Cond(pooled=torch.ones(2, 4)))
