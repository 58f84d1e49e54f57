"""The losses that several trainings share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import target
from ldm.training.diffusion import DiffusionConfig
from ldm.training.draws import Draws


def diffusion_loss(denoiser: Denoiser, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor) -> Tensor:
    """Compute the mean squared error of the prediction at x_t = alpha·x0 + sigma·eps, for each sample.

    Ho et al. 2020, eq. 14, for any prediction.

    Args:
        denoiser: The network in training.
        x0: Clean samples, (B, *S).
        cond: Their condition.
        t: Timesteps, (B,).
        eps: Noise, (B, *S).

    Returns:
        The loss of each sample, (B,).
    """
    x_t = denoiser.schedule.add_noise(x0, t, eps)
    alpha, sigma = denoiser.schedule.alpha_sigma_like(t, x0)
    raw = denoiser.predict(x_t, t, cond)
    return (raw.float() - target(x0, eps, alpha, sigma, denoiser.prediction)).square().flatten(1).mean(1)


class DiffusionLoss(NamedTuple):
    """The loss of a batch at drawn timesteps.

    Args:
        weighted: The mean of the weighted losses over the whole batch, (); see `Draws.mean`.
        losses: The losses without weights, (B,).
        t: The timesteps, (B,).
    """

    weighted: Tensor
    losses: Tensor
    t: Tensor


def draw_diffusion_loss(
    denoiser: Denoiser, config: DiffusionConfig, x0: Tensor, cond: Cond, draws: Draws
) -> DiffusionLoss:
    """Draw timesteps and noise, and compute the weighted diffusion loss.

    Args:
        denoiser: The network in training.
        config: Distribution and weight of the timesteps.
        x0: Clean samples, (B, *S).
        cond: Their condition.
        draws: The samples, with their random numbers.
    """
    t = config.draw(draws).to(x0.device)
    eps = draws.normal(*x0.shape)
    if config.offset_noise:
        eps = eps + config.offset_noise * draws.normal(*x0.shape[:2], 1, 1)
    losses = diffusion_loss(denoiser, x0, cond, t, eps.to(x0.device))
    weight = config.weight(denoiser.schedule.snr(t)).to(losses)
    return DiffusionLoss(draws.mean(weight * losses), losses, t)


def losses_by_timestep(
    losses: Tensor, t: Tensor, timesteps: int, draws: Draws, *, parts: int = 10
) -> dict[str, Tensor]:
    """Return the mean loss in each part of the timesteps, to log: "loss_t0" is that of the least noise.

    Args:
        losses: The loss of each sample, (B,).
        t: Their timesteps, (B,).
        timesteps: T.
        draws: The samples.
        parts: Number of parts. Default: 10.

    Returns:
        The means over the whole batch, each (); NaN for a part without a sample, which the log leaves out.
    """
    place = (t.long() * parts) // timesteps
    counts = draws.processes.total(torch.bincount(place, minlength=parts))
    sums = losses.new_zeros(parts).index_add(0, place, losses.detach())
    means = sums * draws.processes.size / counts
    return {f"loss_t{k}": means[k] for k in range(parts)}


def contrastive_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3).

    Args:
        image: Image embeddings of length 1, (B, E).
        text: The embeddings of their captions, of length 1, (B, E).
        log_scale: Logarithm of the factor on the cosines, (); it is clamped at log(100).

    Returns:
        The loss, and figures to log: how often the nearest image of a caption is its own, and the factor.
    """
    from open_clip.loss import ClipLoss

    scale = log_scale.float().clamp(max=np.log(100.0)).exp()
    hit = ((text @ image.T).argmax(1) == torch.arange(len(image), device=image.device)).float().mean()
    return ClipLoss()(image, text, scale), {"accuracy": hit, "scale": scale}
