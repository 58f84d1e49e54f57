"""The denoiser: a network, the noise schedule it was trained with, and what it predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.interfaces import Denoised, DenoiseFn, Prediction
from ldm.diffusion.prediction import check_prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.support.defaults import as_tensor
from ldm.support.derived import kept_for_call
from ldm.support.device import computing_dtype


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
        return computing_dtype(self.net)

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
        t = as_tensor(t)
        alpha, sigma = self.schedule.alpha_sigma_like(t, x_t)
        raw = self.predict(x_t, t, cond)
        if not self.learned_var:
            return denoised(raw, x_t, alpha, sigma, self.prediction)
        raw, var = raw.chunk(2, dim=1)  # each (B, C, *S)
        return denoised(raw, x_t, alpha, sigma, self.prediction)._replace(var_frac=(var + 1) / 2)

    def predict(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Return the network's raw prediction, shape (B, C or 2C, *S), in the dtype of x_t.

        The arguments are those of `forward`. The network gets x_t and the condition in its own dtype, and the
        schedule's `network_time` as (B,) floats.

        Raises:
            ValueError: If the network returns another shape.
        """
        dtype = self.dtype or x_t.dtype
        t = as_tensor(t).to(x_t.device, torch.promote_types(x_t.dtype, torch.float32))
        cond = (cond or Cond()).expand(len(x_t)).to(x_t.device, dtype)
        # expanded last, by which networks see that all rows have one time: `one_time`
        time = self.schedule.network_time(t.round() if self.quantize else t).expand(len(x_t))  # (B,)
        raw: Tensor = self.net(x_t.to(dtype), time, cond)
        channels = x_t.shape[1] * (2 if self.learned_var else 1)
        if raw.shape != (len(x_t), channels, *x_t.shape[2:]):
            raise ValueError(
                f"the network returned {tuple(raw.shape)}, expected {(len(x_t), channels, *x_t.shape[2:])}"
            )
        return raw.to(x_t.dtype)

    def bind(self, cond: Cond) -> DenoiseFn:
        """Return the DenoiseFn of one condition."""
        return lambda x_t, t: self(x_t, t, cond)


def denoised(raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Denoised:
    """Return x0 and eps of a network's raw prediction (Salimans and Ho 2022, appendix D).

    eps prediction: x0 = (x_t − sigma·eps)/alpha. x0 prediction: eps = (x_t − alpha·x0)/sigma. v prediction:
    x0 = alpha·x_t − sigma·v and eps = sigma·x_t + alpha·v, for alpha² + sigma² = 1.

    Args:
        raw: The prediction, shape (B, *S).
        x_t: The state that it was made for, shape (B, *S).
        alpha: alpha at t, broadcasts against x_t; must be positive for "eps".
        sigma: sigma at t, broadcasts against x_t; must be positive for "x0".
        prediction: What `raw` is: "eps", "x0" or "v".
    """
    check_prediction(prediction)
    if prediction == "eps":
        return Denoised((x_t - sigma * raw) / alpha, raw)
    if prediction == "x0":
        return Denoised(raw, (x_t - alpha * raw) / sigma)
    return Denoised(alpha * x_t - sigma * raw, sigma * x_t + alpha * raw)


def denoise_both(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond
) -> tuple[Denoised, Denoised]:
    """Return the predictions of one state under two conditions; see `denoise_each`.

    Args:
        denoiser: The denoiser.
        x_t: The state, shape (B, *S).
        t: Its timestep, shape () or (B,).
        cond: The first condition, of batch size 1 or B.
        uncond: The second condition, of batch size 1 or B.
    """
    first, second = denoise_each(denoiser, x_t, t, [cond, uncond])
    return first, second


def denoise_each(denoiser: Denoiser, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> list[Denoised]:
    """Return the predictions of one state under K conditions.

    The network runs once on a batch of K·B where the conditions can be joined (`Cond.can_cat`), else K times.

    Args:
        denoiser: The denoiser.
        x_t: The state, shape (B, *S).
        t: Its timestep, shape () or (B,).
        conds: K conditions, each of batch size 1 or B.

    Returns:
        K predictions, whose tensors have the shape (B, *S).
    """
    n, k = len(x_t), len(conds)
    differentiable = torch.is_grad_enabled() and any(
        value.requires_grad for cond in conds for _, value in cond.items()
    )
    # a graph serves one backward pass, so differentiable conditions are joined again at every step
    join = join_conditions if differentiable else joined_conditions
    joined = None if k == 1 else join(tuple(conds), n, x_t.device, denoiser.dtype)
    if joined is None:
        return [denoiser(x_t, t, cond) for cond in conds]
    t = as_tensor(t)
    t = torch.cat([t] * k) if t.ndim == 1 and len(t) == n else t  # (K·B,) or shared
    result = denoiser(torch.cat([x_t] * k), t, joined)
    x0, eps = result.x0.chunk(k), result.eps.chunk(k)
    if result.var_frac is None:
        return [Denoised(x0[i], eps[i]) for i in range(k)]
    var_frac = result.var_frac.chunk(k)
    return [Denoised(x0[i], eps[i], var_frac[i]) for i in range(k)]


def joined_conditions(
    conds: tuple[Cond, ...], n: int, device: torch.device, dtype: torch.dtype | None
) -> Cond | None:
    """Return K conditions as one of batch size K·n; None if they cannot be joined.

    The result is kept for the call (`ldm.support.calls`) while the tensors of the conditions are unchanged:
    the same conditions give the same tensor objects at every step, so a network can cache what it derives
    from them.

    Args:
        conds: K conditions, each of batch size 1 or n.
        n: The batch size of each.
        device: Device of the result.
        dtype: Dtype of its floating-point fields; None keeps theirs.
    """
    sources = [value for cond in conds for _, value in cond.items()]
    return kept_for_call(
        conds[0],
        sources,
        lambda: join_conditions(conds, n, device, dtype),
        key=(*map(id, conds[1:]), n, device, dtype),
    )


def join_conditions(
    conds: Sequence[Cond], n: int, device: torch.device, dtype: torch.dtype | None
) -> Cond | None:
    """Return K conditions as one of batch size K·n, made again; arguments as in `joined_conditions`."""
    expanded = [cond.expand(n) for cond in conds]
    return Cond.cat(expanded).to(device, dtype) if Cond.can_cat(expanded) else None
