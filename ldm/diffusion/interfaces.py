"""The few types that every part of the library shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from ldm.diffusion.grid import TimeGrid

Prediction = Literal["eps", "x0", "v"]  # v = alpha·eps − sigma·x0


class Denoised(NamedTuple):
    """What a network says about x_t: clean data and noise, and (learned range) where log variance lies in [0,
    1]. Each (B, *S)."""

    x0: Tensor
    eps: Tensor
    var_frac: Tensor | None = None


DenoiseFn = Callable[[Tensor, Tensor], Denoised]  # (x_t (B, *S), t () or (B,), may be fractional)
# (index of the draw, like) -> standard normal of like's shape, dtype and device
NoiseFn = Callable[[int, Tensor], Tensor]
# may return a new x; raising StopIteration ends the run
OnStep = Callable[[int, Tensor, Denoised], Tensor | None]


class Sampler(Protocol):
    """Solves the reverse process over a grid; x (B, *S) is the state at grid entry 0, the result the state at
    entry N."""

    def __call__(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        grid: TimeGrid,
        *,
        noise: NoiseFn | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor: ...
