"""The losses that several trainings share."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser, denoised
from ldm.diffusion.prediction import target
from ldm.diffusion.schedule import NoiseSchedule
from ldm.training.diffusion import DiffusionConfig
from ldm.training.draws import Draws


def diffusion_loss(denoiser: Denoiser, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor) -> Tensor:
    """Compute the mean squared error of the prediction at x_t = alpha·x0 + sigma·eps, for each sample.

    Ho et al. 2020, eq. 14, for any prediction. To that of a network that predicts a variance too, T/1000
    times the divergence of `variance_loss` is added, which trains the variance alone (Nichol & Dhariwal 2021,
    eq. 16).

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
    raw, added = (
        denoiser.predict(x_t, t, cond).float(),
        torch.zeros((), dtype=torch.float32, device=x0.device),
    )
    if denoiser.learned_var:
        raw, position = raw.chunk(2, dim=1)  # each (B, C, *S)
        made = denoised(raw.detach(), x_t, alpha, sigma, denoiser.prediction).x0
        divergence = variance_loss(denoiser.schedule, x0, made, (position + 1) / 2, t)
        added = len(denoiser.schedule) / 1000 * divergence
    wanted = target(x0, eps, alpha, sigma, denoiser.prediction)
    return (raw - wanted).square().flatten(1).mean(1) + added


def variance_loss(schedule: NoiseSchedule, x0: Tensor, made: Tensor, var_frac: Tensor, t: Tensor) -> Tensor:
    """Compute the divergence of a predicted denoising step from the true one, for each sample, in bits.

    KL(q(x_{t-1} | x_t, x0) ‖ p(x_{t-1} | x_t)), the mean over the values of a sample (Nichol & Dhariwal 2021,
    eq. 5). At t = 0, where q has no variance, that of t = 1 stands for it.

    Args:
        schedule: The noise schedule.
        x0: Clean samples, (B, *S).
        made: The predicted clean samples, (B, *S).
        var_frac: Position of the log variance between the posterior's and beta, (B, *S); see `Denoiser`.
        t: Timesteps, (B,) int64.

    Returns:
        The divergences, (B,).
    """
    kept = schedule.alphas_cumprod.cpu().double()  # (T,)
    before = F.pad(kept[:-1], (1, 0), value=1.0)
    beta = 1 - kept / before
    small = beta * (1 - before) / (1 - kept)
    small[0] = small[1]
    weights = before.sqrt() * beta / (1 - kept)  # of x0 in the mean

    def at_t(values: Tensor) -> Tensor:
        return values[t.cpu()].view(-1, *[1] * (x0.ndim - 1)).to(x0)

    weight, log_true = at_t(weights), at_t(small.log())
    log_made = var_frac * at_t(beta.log()) + (1 - var_frac) * log_true
    square = (weight * (x0 - made)).square()
    divergence = 0.5 * (log_made - log_true - 1 + (log_true - log_made).exp() + square * (-log_made).exp())
    return divergence.flatten(1).mean(1) / math.log(2)


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
