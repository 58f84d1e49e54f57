"""The diffusion process in training: its schedule, timesteps and weights, and the samples of validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.interfaces import Prediction
from ldm.diffusion.noise import initial_noise
from ldm.diffusion.schedule import NoiseSchedule, ScheduleName
from ldm.models.unet import UNet
from ldm.samplers.ode.dpmpp_2m import dpmpp_2m
from ldm.training.config import check_at_least, check_fraction
from ldm.training.draws import Draws


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise schedule, the prediction, and the distribution and weight of timesteps in training.

    Args:
        schedule: Name of the schedule. Default: "cosine".
        timesteps: T, the number of training timesteps, at least 2. Default: 1000.
        prediction: What the network predicts. Default: "v".
        min_snr: γ of the loss weight min(SNR, γ) in terms of x0 (Hang et al. 2023, arXiv:2303.09556); None
            for a weight of 1 on the prediction's own error. Default: None.
        snr_plus_one: γ of the loss weight min(SNR + 1, γ) in terms of x0, the loss of v bounded from above
            (Salimans & Ho 2022, section 4); None for no such weight. Default: None.
        drop: Share of captions replaced by the empty one, for classifier-free guidance. Default: 0.1.
        shift: s of the timestep distribution s·u/(1 + (s − 1)·u) with u uniform; s > 1 draws more noisy
            timesteps (Esser et al. 2024, eq. 23). Default: 1.
        zero_terminal_snr: Whether the schedule is rescaled to a signal-to-noise ratio of zero at the last
            timestep (Lin et al. 2023); the prediction is "v" or "x0" then. Default: False.
        offset_noise: Standard deviation of a number that is added to all pixels of a channel's noise, so that
            brightness is learned too (Guttenberg 2023). Default: 0.
    """

    schedule: ScheduleName = "cosine"
    timesteps: int = 1000
    prediction: Prediction = "v"
    min_snr: float | None = None
    snr_plus_one: float | None = None
    drop: float = 0.1
    shift: float = 1.0
    zero_terminal_snr: bool = False
    offset_noise: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(2, timesteps=self.timesteps)
        check_fraction(drop=self.drop)
        check_at_least(0, offset_noise=self.offset_noise)
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError("zero_terminal_snr: expected prediction 'v' or 'x0', got 'eps'")
        if not self.shift > 0:
            raise ValueError(f"shift: expected a positive number, got {self.shift}")
        for name, bound in (("min_snr", self.min_snr), ("snr_plus_one", self.snr_plus_one)):
            if bound is not None and not bound > 0:
                raise ValueError(f"{name}: expected a positive number, got {bound}")
        if self.min_snr is not None and self.snr_plus_one is not None:
            raise ValueError(
                f"expected one of min_snr and snr_plus_one, got {self.min_snr} and {self.snr_plus_one}"
            )

    def make(self) -> NoiseSchedule:
        """Build the schedule's tables."""
        schedule = NoiseSchedule.make(self.schedule, self.timesteps)
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule

    def draw(self, draws: Draws) -> Tensor:
        """Draw the timesteps of samples, (n,) int64, stratified: one in each B-th of the distribution."""
        inside = torch.from_numpy(draws.random()).float()
        u = (draws.places + inside) / len(draws.batch)
        return (
            (self.shift * u / (1 + (self.shift - 1) * u) * self.timesteps)
            .long()
            .clamp_max(self.timesteps - 1)
        )

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight of the prediction's squared error at a signal-to-noise ratio.

        With `min_snr` it is 1 at a ratio of 0, where the rule would be 0 and nothing would be learned.
        """
        if self.min_snr is not None:
            wanted = snr.clamp(max=self.min_snr)
        elif self.snr_plus_one is not None:
            wanted = (snr + 1).clamp(max=self.snr_plus_one)
        else:
            return torch.ones_like(snr)
        # x0's squared error is the prediction's, divided by this
        ratio = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.prediction]
        return torch.where(snr == 0, 1.0, wanted / ratio) if self.min_snr is not None else wanted / ratio


def sample_latents(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond,
    shape: tuple[int, int, int],
    *,
    n: int,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Sample latents with DPM-Solver++ 2M, as validation and sample images need them.

    Args:
        denoiser: The network in training.
        cond: Condition of n samples.
        uncond: Condition that guidance extrapolates from.
        shape: Shape (C, h, w) of a latent.
        n: Number of samples; sample i has seed `seed` + i.
        steps: Sampling steps.
        guidance: Guidance scale; 1 is no guidance.
        seed: Seed of the first sample.

    Returns:
        Scaled latents, (n, C, h, w).
    """
    x = initial_noise(range(seed, seed + n), shape).to(next(denoiser.net.parameters()).device)
    grid = TimeGrid.make(denoiser.schedule, steps, spacing="trailing")
    return dpmpp_2m(cfg(denoiser, cond, uncond, guidance), x, grid)


def zero_outputs(net: UNet) -> None:
    """Set every residual branch and the output of a UNet to zero (Dhariwal & Nichol 2021)."""
    for name, module in net.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
