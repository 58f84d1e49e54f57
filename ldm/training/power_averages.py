"""Averages of weights of any width, computed after training (post-hoc EMA, Karras et al. 2024, section 3).

The average with exponent γ weighs the weights after step τ of t by p(τ) = (γ + 1)·τ^γ / t^(γ+1). Its width is
the standard deviation of p relative to t,

    width = (γ + 1)^½ · (γ + 2)^−1 · (γ + 3)^−½.

While a run trains, it keeps two such averages and writes both to a file at intervals. The average of another
width, at the end or at an earlier step, is the linear combination Σ x_i·θ_i of what was written whose profile
is nearest in the least squares to the wanted one: A·x = b with A_ij = ∫ p_i·p_j and b_i = ∫ p_i·p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.support.warn import warn_user
from ldm.training.caches.hashed import compare_hash, write_hashed
from ldm.weights.formats.safetensors import map_safetensors

WIDEST = 12**-0.5  # the width at γ = 0, that of the mean of all weights
FOLDER = "averages"  # of the files, in a run's folder


class Profile(NamedTuple):
    """The profile of an average: its step t, and its exponent γ."""

    step: int
    gamma: float


def exponent(width: float) -> float:
    """Return the exponent γ of a width, in closed form to rounding.

    Raises:
        ValueError: If the width is outside (0, 12^−½), where γ = 0.
    """
    if not 0 < width < WIDEST:
        raise ValueError(f"width: expected a number between 0 and {WIDEST:.4f}, got {width}")
    low, high = 0.0, 2 / width  # width < 1/γ
    for _ in range(200):  # the width falls with γ
        middle = (low + high) / 2
        low, high = (middle, high) if relative_width(middle) > width else (low, middle)
    return (low + high) / 2


def relative_width(gamma: float) -> float:
    """Return the width of the profile with exponent γ."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def power_decay(step: int, gamma: float) -> float:
    """Return d of shadow ← d · shadow + (1 − d) · weights after step 1, 2, … (eq. 7): (1 − 1/t)^(γ+1)."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_product(a: Profile, b: Profile) -> float:
    """Return ∫ p_a·p_b of two profiles (appendix C)."""
    (ta, ga), (tb, gb) = a, b
    least = min(ta, tb)
    # min^(γa+γb+1) / (ta^(γa+1) · tb^(γb+1)), without large powers
    power = (least / ta) ** (ga + 1) * (least / tb) ** (gb + 1) / least
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * power


def combination(kept: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Return the factors of kept averages whose combination is nearest to the wanted one, (n,) float64."""
    a = np.array([[inner_product(p, q) for q in kept] for p in kept])
    b = np.array([inner_product(p, wanted) for p in kept])
    scale = np.sqrt(np.diag(a))  # profiles of early steps are tall
    solution: np.ndarray = np.linalg.lstsq(a / scale / scale[:, None], b / scale, rcond=1e-13)[0] / scale
    return solution


def snapshot_file(folder: Path, step: int) -> Path:
    """Return the file of the averages of a step in a run's folder."""
    return folder / FOLDER / f"{step:07d}.safetensors"


def write_snapshot(folder: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Write the averages of a step, in half precision.

    Args:
        folder: The run's folder.
        step: The number of steps taken.
        averages: For each width, the averages by parameter name.
    """
    path = snapshot_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        f"{width}/{name}": value.detach().to("cpu", torch.float16).contiguous()
        for width, values in averages.items()
        for name, value in values.items()
    }
    write_hashed(path, state)


def read_snapshot(path: Path) -> dict[str, Tensor]:
    """Return the averages in a file by width and parameter name, as ``WIDTH/NAME``.

    Raises:
        ValueError: If one is not what was written; the message names the file.

    Warns:
        UserWarning: If the file has no hashes, as those of earlier versions.
    """
    state, hashes = map_safetensors(path)
    if not state.keys() <= hashes.keys():
        warn_user(f"{str(path)!r} has no hashes of its averages: whether it is intact is not known")
        return state
    for name, value in state.items():
        compare_hash(value.numpy(), hashes[name], path, name, "put back a copy, or delete it")
    return state


def average_of_width(folder: Path, width: float, *, step: int | None = None) -> dict[str, Tensor]:
    """Return the average of any width, from the files in a run's folder.

    Args:
        folder: The run's folder.
        width: Its width, such as 0.1.
        step: The step at whose end it is taken; None for the last one that was written. Default: None.

    Returns:
        The averages by parameter name, float32.

    Raises:
        FileNotFoundError: If the run wrote no averages.
        ValueError: If the width is out of range, the step is before the first that was written, or a file
            is damaged.
    """
    gamma = exponent(width)
    files = sorted((folder / FOLDER).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no averages in {str(folder / FOLDER)!r}: set run.widths to write them")
    steps = [int(path.stem) for path in files]
    last = steps[-1] if step is None else step
    if not steps[0] <= last:
        raise ValueError(f"step {last}: expected at least {steps[0]}, the first with averages")
    used = [path for path, of in zip(files, steps, strict=True) if of <= last]
    widths = sorted({float(key.partition("/")[0]) for key in map_safetensors(used[0])[0]})
    kept = [Profile(int(path.stem), exponent(each)) for path in used for each in widths]
    factors = iter(combination(kept, Profile(last, gamma)))
    total: dict[str, Tensor] = {}
    for path in used:
        state = read_snapshot(path)
        for each in widths:
            factor, prefix = float(next(factors)), f"{each}/"
            for key in (key for key in state if key.startswith(prefix)):
                name, value = key.removeprefix(prefix), factor * state[key].double()
                total[name] = total[name] + value if name in total else value
    return {name: value.float() for name, value in total.items()}
