"""A network, a schedule and what the network predicts, together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.interfaces import Denoised, DenoiseFn, Prediction
from ldm.diffusion.prediction import check_prediction, denoised
from ldm.diffusion.schedule import NoiseSchedule, broadcast


class Denoiser(nn.Module):
    """net(x_t, t, cond) -> raw prediction, read as x0 and eps.

    ``learned_var``: the net gives twice the channels, the second half being v in [−1, 1] of Improved DDPM's
    learned range. ``quantize``: the net sees t rounded to a table entry (as it was trained), while x0 and eps
    are derived at the exact t.
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
                "a zero-terminal-SNR schedule needs prediction 'v' or 'x0': from eps alone x0 is not defined"
                " at alpha 0"
            )
        self.net = net
        self.schedule = schedule
        self.prediction = prediction
        self.learned_var = learned_var
        self.quantize = quantize

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the net computes in; None where it has no floating-point parameter."""
        return next((p.dtype for p in self.net.parameters() if p.is_floating_point()), None)

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        """Denoised from x_t (B, *S) at t () or (B,), in float32 (float64 if x_t is) whatever the net computes
        in."""
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        t = torch.as_tensor(t)
        alpha, sigma = (broadcast(value, x_t) for value in self.schedule.alpha_sigma(t))
        raw = self.predict(x_t, t, cond)
        if not self.learned_var:
            return denoised(raw, x_t, alpha, sigma, self.prediction)
        raw, var = raw.chunk(2, dim=1)  # each (B, C, *S)
        return denoised(raw, x_t, alpha, sigma, self.prediction)._replace(var_frac=(var + 1) / 2)

    def predict(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """The net's own answer, (B, C or 2C, *S), in x_t's dtype; the net gets its own dtype, and t as (B,)
        floats."""
        dtype = self.dtype or x_t.dtype
        # (B,)
        t = torch.as_tensor(t).to(x_t.device, torch.promote_types(x_t.dtype, torch.float32)).expand(len(x_t))
        cond = (cond or Cond()).expand(len(x_t)).to(x_t.device, dtype)
        raw: Tensor = self.net(x_t.to(dtype), t.round() if self.quantize else t, cond)
        channels = x_t.shape[1] * (2 if self.learned_var else 1)
        if raw.shape != (len(x_t), channels, *x_t.shape[2:]):
            raise ValueError(
                f"the network gave {tuple(raw.shape)}, expected {(len(x_t), channels, *x_t.shape[2:])}"
            )
        return raw.to(x_t.dtype)

    def bind(self, cond: Cond) -> DenoiseFn:
        """The DenoiseFn of one condition."""
        return lambda x_t, t: self(x_t, t, cond)
