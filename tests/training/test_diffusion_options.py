"""Options of the diffusion in training: loss weights, zero terminal SNR and offset noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.training.diffusion import DiffusionConfig
from ldm.training.draws import Draws
from ldm.training.losses.common import draw_diffusion_loss


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_is_the_same_weight_of_x0_for_every_prediction(prediction):
    """The weight of x0's squared error is min(SNR, γ); eps's error is x0's times SNR, v's times SNR + 1."""
    config = DiffusionConfig(prediction=prediction, min_snr=5.0)
    snr = torch.tensor([0.01, 1.0, 5.0, 100.0], dtype=torch.float64)
    in_x0 = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]
    torch.testing.assert_close(config.weight(snr) * in_x0, snr.clamp(max=5.0))


def test_zero_terminal_snr_ends_at_noise_and_its_last_step_is_learned():
    config = DiffusionConfig(schedule="scaled_linear", zero_terminal_snr=True, min_snr=5.0)
    schedule = config.make()
    assert float(schedule.snr(torch.tensor(999))) == 0
    assert config.weight(schedule.snr(torch.tensor([999, 500])))[0] == 1
    with pytest.raises(ValueError, match="zero_terminal_snr: .* got 'eps'"):
        DiffusionConfig(prediction="eps", zero_terminal_snr=True)


class Recorder(nn.Module):
    """A network that predicts 0 and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen = x_t
        return self.factor * x_t


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_offset_noise_shifts_each_channel_and_is_learned(offset):
    """At zero SNR x_t is the noise: the variance of its mean over 16² pixels is 1/256 + offset²."""
    config = DiffusionConfig(prediction="v", zero_terminal_snr=True, offset_noise=offset, timesteps=2)
    net = Recorder()
    means, losses = [], []
    for step in range(40):
        draws = Draws.of_step(0, step, 16)
        x0 = torch.zeros(16, 4, 16, 16)
        found = draw_diffusion_loss(Denoiser(net, config.make(), "v"), config, x0, Cond(), draws)
        last = found.t == 1
        means.append(net.seen[last].mean((2, 3)).flatten())
        losses.append(found.losses[last])
    assert float(torch.cat(means).var()) == pytest.approx(1 / 256 + offset**2, rel=0.1)
    # v = −x0 at zero SNR: the target holds no noise there
    assert float(torch.cat(losses).detach().abs().max()) == 0


def test_a_negative_offset_is_refused():
    with pytest.raises(ValueError, match="offset_noise: expected at least 0"):
        DiffusionConfig(offset_noise=-0.1)
