"""The types that every part of the library shares: predictions, denoisers, noise sources and samplers.

Symbols used throughout: B is the batch size, *S the shape of one sample (C, h, w for a latent), t a timestep,
and x_t = alpha_t·x0 + sigma_t·eps the state at t of clean data x0 and standard normal noise eps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from ldm.diffusion.grid import TimeGrid

Prediction = Literal["eps", "x0", "v"]
"""The quantity that a network predicts; v = alpha·eps − sigma·x0."""


class Denoised(NamedTuple):
    """Estimates of the clean data and the noise in a state x_t, with x_t = alpha_t·x0 + sigma_t·eps.

    Attributes:
        x0: Estimated clean data, shape (B, *S).
        eps: Estimated noise, shape (B, *S).
        var_frac: For networks with learned variance, the position of the log variance between its lower bound
            (0) and its upper bound (1), shape (B, *S). None for other networks.
    """

    x0: Tensor
    eps: Tensor
    var_frac: Tensor | None = None


DenoiseFn = Callable[[Tensor, Tensor], Denoised]
"""`(x_t, t) -> Denoised`: x_t has shape (B, *S), t has shape () or (B,) and may be fractional."""

NoiseFn = Callable[[int, Tensor], Tensor]
"""`(k, like) -> z`: draw number k of standard normal noise, with the shape, dtype and device of `like`."""

OnStep = Callable[[int, Tensor, Denoised], Tensor | None]
"""`(i, x, denoised) -> x or None`: called after step i. A returned tensor replaces the state; raising
StopIteration ends the run."""


class Sampler(Protocol):
    """A function that solves the reverse process over a time grid.

    This is what all samplers share. A sampler may have further keyword arguments (`eta`, `order`, …); code
    that chooses the sampler by name passes them as `**options`.
    """

    def __call__(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        grid: TimeGrid,
        *,
        noise: NoiseFn | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Return the state at the last grid entry, shape (B, *S).

        Args:
            denoise: The denoiser, `(x_t, t) -> Denoised`.
            x: The state at grid entry 0, shape (B, *S).
            grid: The N timesteps to visit and the N + 1 states' alpha and sigma.
            noise: The noise source; required by stochastic samplers. Default: None.
            on_step: Called after each step. Default: None.
        """
        ...
