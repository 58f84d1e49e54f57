"""What a network predicts: eps, x0 or v, and the way from each to the others."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from ldm.diffusion.interfaces import Denoised, Prediction
from ldm.support.config import nearest

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def check_prediction(prediction: str) -> None:
    """Raises ValueError if the name is none of eps, x0, v."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; {nearest(prediction, PREDICTIONS)}")


def target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """What the network should have said: (B, *S); alpha and sigma broadcast against x0  (v: arXiv:2202.00512,
    appendix D)."""
    check_prediction(prediction)
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    return alpha * eps - sigma * x0


def denoised(raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Denoised:
    """x0 and eps (B, *S) from what the network said; alpha and sigma broadcast against x_t; eps needs alpha >
    0, x0 sigma > 0."""
    check_prediction(prediction)
    if prediction == "eps":
        return Denoised((x_t - sigma * raw) / alpha, raw)
    if prediction == "x0":
        return Denoised(raw, (x_t - alpha * raw) / sigma)
    return Denoised(alpha * x_t - sigma * raw, sigma * x_t + alpha * raw)
