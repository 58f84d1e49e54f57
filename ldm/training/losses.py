"""The one loss of diffusion training."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import target


def diffusion_loss(denoiser: Denoiser, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the raw prediction at x_t = alpha·x0 + sigma·eps, one for each sample: (B,) (Ho
    et al. 2020, eq. 14, for any prediction).

    x0 and eps (B, *S), t (B,) in timesteps.
    """
    x_t = denoiser.schedule.add_noise(x0, t, eps)
    alpha, sigma = denoiser.schedule.alpha_sigma_like(t, x0)
    raw = denoiser.predict(x_t, t, cond)
    return (raw.float() - target(x0, eps, alpha, sigma, denoiser.prediction)).square().flatten(1).mean(1)
