"""The denoiser: a network, the noise schedule it was trained with, and what it predicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.interfaces import Denoised, DenoiseFn, Prediction
from ldm.diffusion.prediction import check_prediction, denoised
from ldm.diffusion.schedule import NoiseSchedule


class Denoiser(nn.Module):
    """A network `net(x_t, t, cond)` whose prediction is returned as x0 and eps.

    Args:
        net: The network; takes x_t (B, C, *S), t (B,) and a `Cond` of batch size B, all on one device.
        schedule: The noise schedule that it was trained with.
        prediction: What it predicts: "eps", "x0" or "v".
        learned_var: Whether it predicts 2C channels, the second half of which is the position of the log
            variance in its range, in [−1, 1] (Improved DDPM, arXiv:2102.09672, eq. 15). Default: False.
        quantize: Whether the network gets t rounded to a table entry; x0 and eps are derived at the exact t
            in any case. Default: False.

    Raises:
        ValueError: For an unknown prediction, or "eps" with a zero-terminal-SNR schedule.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: NoiseSchedule,
        prediction: Prediction,
        *,
        learned_var: bool = False,
        quantize: bool = False,
    ) -> None:
        super().__init__()
        check_prediction(prediction)
        if prediction == "eps" and float(schedule.alphas_cumprod[-1]) == 0:
            raise ValueError(
                "a zero-terminal-SNR schedule needs prediction 'v' or 'x0': at alpha 0, x0 cannot be derived"
                " from eps"
            )
        self.net = net
        self.schedule = schedule
        self.prediction = prediction
        self.learned_var = learned_var
        self.quantize = quantize

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the network computes in; None if it has no floating-point parameter."""
        return next((p.dtype for p in self.net.parameters() if p.is_floating_point()), None)

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        """Return x0 and eps, each (B, *S).

        Args:
            x_t: The state, shape (B, *S).
            t: Its timestep in [0, T − 1], shape () or (B,), may be fractional.
            cond: The condition, of batch size 1 or B. Default: unconditional.

        Returns:
            The prediction in float32, or float64 if x_t is float64, whatever dtype the network computes in.
        """
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        t = torch.as_tensor(t)
        alpha, sigma = self.schedule.alpha_sigma_like(t, x_t)
        raw = self.predict(x_t, t, cond)
        if not self.learned_var:
            return denoised(raw, x_t, alpha, sigma, self.prediction)
        raw, var = raw.chunk(2, dim=1)  # each (B, C, *S)
        return denoised(raw, x_t, alpha, sigma, self.prediction)._replace(var_frac=(var + 1) / 2)

    def predict(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Return the network's raw prediction, shape (B, C or 2C, *S), in the dtype of x_t.

        The arguments are those of `forward`. The network gets x_t and the condition in its own dtype, and t
        as (B,) floats.

        Raises:
            ValueError: If the network returns another shape.
        """
        dtype = self.dtype or x_t.dtype
        t = torch.as_tensor(t).to(x_t.device, torch.promote_types(x_t.dtype, torch.float32))
        t = t.expand(len(x_t))  # (B,)
        cond = (cond or Cond()).expand(len(x_t)).to(x_t.device, dtype)
        raw: Tensor = self.net(x_t.to(dtype), t.round() if self.quantize else t, cond)
        channels = x_t.shape[1] * (2 if self.learned_var else 1)
        if raw.shape != (len(x_t), channels, *x_t.shape[2:]):
            raise ValueError(
                f"the network returned {tuple(raw.shape)}, expected {(len(x_t), channels, *x_t.shape[2:])}"
            )
        return raw.to(x_t.dtype)

    def bind(self, cond: Cond) -> DenoiseFn:
        """Return the DenoiseFn of one condition."""
        return lambda x_t, t: self(x_t, t, cond)
