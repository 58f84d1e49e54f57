"""The random numbers of training.

Batch k of size B consists of the samples k·B … k·B + B − 1. What a sample shows is a function of the run's
seed and of this global index alone (`Draws.of_sample`), so that it depends neither on the process that
computes it nor on a restart.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

OF_SAMPLES = 1 << 63  # keys of samples, which are apart from those of steps
MOST_USES = 16  # independent generators of a sample, in each stream


class Draws:
    """The random numbers of one training step: a NumPy and a PyTorch generator keyed by (seed, step, stream).

    A resumed run draws the same numbers as an uninterrupted one, because no generator outlives its step.

    Args:
        seed: The run's seed, at least 0.
        step: The step, from 0.
        stream: Tells independent uses of one step apart, such as initialisation. Default: 0.
    """

    def __init__(self, seed: int, step: int, stream: int = 0) -> None:
        self.seed, self.step, self.stream = seed, step, stream
        self.rng = _philox(seed, (stream << 48) + step)
        self.torch = torch.Generator("cpu").manual_seed(int(self.rng.integers(2**63)))

    def at(self, step: int) -> Draws:
        """Return the random numbers of another step."""
        return Draws(self.seed, step, self.stream)

    def indices(self, batch: int) -> range:
        """Return the global indices of the step's samples."""
        return range(self.step * batch, (self.step + 1) * batch)

    def of_sample(self, index: int, use: int = 0) -> np.random.Generator:
        """Return a generator keyed by (seed, global index of a sample, use, stream).

        Args:
            index: Global index of the sample, below 2**40.
            use: Tells independent uses apart: 0 for what the sample shows, 1 for its caption, below 16.
                Default: 0.
        """
        return _philox(self.seed, OF_SAMPLES + ((self.stream * MOST_USES + use) << 40) + index)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, float32, on the CPU."""
        return torch.randn(*shape, generator=self.torch, device="cpu", dtype=torch.float32)


def _philox(seed: int, counter: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, counter], dtype=np.uint64)))
