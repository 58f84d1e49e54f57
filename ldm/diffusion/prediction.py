"""What a network predicts (eps, x0 or v), and the target of its training.

With x_t = alpha·x0 + sigma·eps and v = alpha·eps − sigma·x0 (Salimans and Ho 2022, arXiv:2202.00512, appendix
D), `ldm.diffusion.denoiser.denoised` reads a prediction as x0 and eps.
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from ldm.diffusion.interfaces import Prediction
from ldm.support.config import nearest
from ldm.support.text import shown

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def check_prediction(prediction: str) -> None:
    """Raise ValueError unless the name is eps, x0 or v."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {shown(prediction)}; {nearest(prediction, PREDICTIONS)}")


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
