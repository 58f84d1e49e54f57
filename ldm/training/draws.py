"""The random numbers of training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Draws:
    """The random numbers of one training step: a NumPy and a PyTorch generator keyed by (seed, step, stream).

    A resumed run draws the same numbers as an uninterrupted one, because no generator outlives its step.

    Args:
        seed: The run's seed, at least 0.
        step: The step, from 0.
        stream: Tells independent uses of one step apart, such as initialisation. Default: 0.
    """

    def __init__(self, seed: int, step: int, stream: int = 0) -> None:
        self.rng = np.random.Generator(
            np.random.Philox(key=np.array([seed, (stream << 48) + step], dtype=np.uint64))
        )
        self.torch = torch.Generator("cpu").manual_seed(int(self.rng.integers(2**63)))

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, float32, on the CPU."""
        return torch.randn(*shape, generator=self.torch, device="cpu", dtype=torch.float32)
