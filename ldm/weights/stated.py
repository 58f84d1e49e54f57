"""What weights state about their own use, in the terms of a card."""

from __future__ import annotations

from typing import NamedTuple

from ldm.catalog.cards import ScheduleCard
from ldm.diffusion.interfaces import Prediction
from ldm.support.scalars import finite_number


class Stated(NamedTuple):
    """What weights state; None, False or nothing where they state nothing.

    Attributes:
        prediction: What the network predicts.
        zero_terminal_snr: Whether the schedule ends at a signal-to-noise ratio of zero.
        schedule: The noise schedule.
        spacing: Spacing of the grid of an EDM schedule.
        rho: Exponent of that spacing.
        latent_scale: Factor of the latents.
        latent_mean: Mean of each channel of the latents.
        latent_std: Standard deviation of each channel of the latents.
        zero_negative: Whether an empty negative prompt is encoded as zeros.
        pad: Token that the texts of the first text tower are padded with.
        pad2: The same of the second text tower.
        negated: Whether the network returns −v, as those of EDM do.
    """

    prediction: Prediction | None = None
    zero_terminal_snr: bool = False
    schedule: ScheduleCard | None = None
    spacing: str | None = None
    rho: float | None = None
    latent_scale: float | None = None
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    zero_negative: bool | None = None
    pad: int | None = None
    pad2: int | None = None
    negated: bool = False


def edm_statement(
    sigmas: tuple[float, float, float],
    *,
    timesteps: int = 1000,
    spacing: str = "karras",
    negated: bool = True,
) -> Stated:
    """Return the statement of a network that was trained as EDM does; see `ldm.diffusion.edm`.

    Args:
        sigmas: The smallest and the largest noise level, and the standard deviation of the data.
        timesteps: Entries of the schedule's table. Default: 1000.
        spacing: Spacing of the grid. Default: "karras".
        negated: Whether the network returns −v, as in EDM itself, and not v. Default: True.
    """
    schedule = ScheduleCard(kind="edm", timesteps=timesteps, sigmas=sigmas)
    return Stated("v", schedule=schedule, spacing=spacing, negated=negated)


def positive_number(name: str, value: object) -> float:
    """Return a positive finite number as a float; ValueError, which names it, for anything else."""
    number = finite_number(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a positive number, got {number}")
    return number
