"""What a network predicts (eps, x0 or v), and the conversions between them.

With x_t = alpha·x0 + sigma·eps and v = alpha·eps − sigma·x0 (Salimans and Ho 2022, arXiv:2202.00512, appendix
D):

    eps prediction   x0 = (x_t − sigma·eps)/alpha
    x0 prediction    eps = (x_t − alpha·x0)/sigma
    v prediction     x0 = alpha·x_t − sigma·v,  eps = sigma·x_t + alpha·v  (for alpha² + sigma² = 1)
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from ldm.diffusion.interfaces import Denoised, Prediction
from ldm.support.config import nearest

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def check_prediction(prediction: str) -> None:
    """Raise ValueError unless the name is eps, x0 or v."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; {nearest(prediction, PREDICTIONS)}")


def target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """Return the value that a perfect network would predict.

    Args:
        x0: Clean data, shape (B, *S).
        eps: Noise, shape (B, *S).
        alpha: alpha at t, broadcasts against x0.
        sigma: sigma at t, broadcasts against x0.
        prediction: What the network predicts: "eps", "x0" or "v".

    Returns:
        The target of training, shape (B, *S).
    """
    check_prediction(prediction)
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    return alpha * eps - sigma * x0


def denoised(raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Denoised:
    """Return x0 and eps of a network's raw prediction.

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
