"""The samples of a training step, and their random numbers.

Step k of a run with batches of B trains on the samples k·B … k·B + B − 1. All random numbers of a sample are
drawn from the seed and this global index alone, so that a batch depends neither on the processes that share
it nor on a restart.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.training.distributed.processes import ONE_PROCESS, Processes

OF_SAMPLES = 1 << 63  # keys of samples
MOST_USES = 16  # independent generators of a sample, in each stream
STATEFUL_USE = MOST_USES - 1  # the use of `Draws.rngs`


class Draws:
    """A share of a batch: its samples, their random numbers, and means over the whole batch.

    No generator outlives the step, so that a resumed run draws the same numbers as an uninterrupted one.

    Args:
        seed: The run's seed, at least 0.
        samples: The global indices of the samples of this share.
        batch: The samples of the whole batch, of which each process has a share; None for `samples`.
            Default: None.
        stream: Tells independent uses of one sample apart, such as initialisation. Default: 0.
        processes: The processes that share the batch. Default: this one alone.
        passed: Number of samples of all processes in this forward pass, over which means are taken; None for
            the whole batch. Default: None.
    """

    def __init__(
        self,
        seed: int,
        samples: range,
        *,
        batch: range | None = None,
        stream: int = 0,
        processes: Processes = ONE_PROCESS,
        passed: int | None = None,
    ) -> None:
        self.seed, self.samples, self.stream, self.processes = seed, samples, stream, processes
        self.batch = samples if batch is None else batch
        self.passed = len(self.batch) if passed is None else passed

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a copy in another process is made of; it takes no part in the work of the group."""
        return _restored, (self.seed, self.samples, self.batch, self.stream, self.passed)

    @classmethod
    def of_step(cls, seed: int, step: int, batch: int, processes: Processes = ONE_PROCESS) -> Draws:
        """Return this process's share of the batch of a step."""
        whole = range(step * batch, (step + 1) * batch)
        return cls(seed, processes.share(whole), batch=whole, processes=processes)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def step(self) -> int:
        """The step, from 0."""
        return self.batch.start // len(self.batch)

    def at(self, step: int) -> Draws:
        """Return the same share of another step's batch."""
        ahead = (step - self.step) * len(self.batch)
        samples, batch = (range(part.start + ahead, part.stop + ahead) for part in (self.samples, self.batch))
        return Draws(
            self.seed, samples, batch=batch, stream=self.stream, processes=self.processes, passed=self.passed
        )

    @property
    def share(self) -> Draws:
        """The whole share of this process, of which this may be one of the `parts`."""
        samples = self.processes.share(self.batch)
        return Draws(self.seed, samples, batch=self.batch, stream=self.stream, processes=self.processes)

    def in_stream(self, stream: int) -> Draws:
        """Return the same share with the random numbers of another stream."""
        return Draws(
            self.seed,
            self.samples,
            batch=self.batch,
            stream=stream,
            processes=self.processes,
            passed=self.passed,
        )

    def parts(self, n: int) -> list[Draws]:
        """Return the share in n parts for as many forward passes; each process has at least n samples.

        The mean of the batch is the mean of the parts' means, each with the weight `weight`.
        """
        if n == 1:
            return [self]
        shares = [self.processes.share(self.batch, rank) for rank in range(self.processes.size)]
        return [
            Draws(
                self.seed,
                _part(self.samples, k, n),
                batch=self.batch,
                stream=self.stream,
                processes=self.processes,
                passed=sum(len(_part(share, k, n)) for share in shares),
            )
            for k in range(n)
        ]

    @property
    def weight(self) -> float:
        """The share of the batch that is in this forward pass."""
        return self.passed / len(self.batch)

    def of_sample(self, index: int, use: int = 0) -> np.random.Generator:
        """Return a generator keyed by (seed, global index of a sample, use, stream).

        Args:
            index: Global index of the sample, below 2**40.
            use: Tells independent uses apart: 0 for what the sample shows, 1 for its caption, below 15.
                Default: 0.
        """
        counter = OF_SAMPLES + ((self.stream * MOST_USES + use) << 40) + index
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, counter], dtype=np.uint64)))

    @cached_property
    def rngs(self) -> list[np.random.Generator]:
        """A generator of each sample, from which the methods below draw one after the other."""
        return [self.of_sample(index, STATEFUL_USE) for index in self.samples]

    @property
    def places(self) -> Tensor:
        """The places of the samples in the batch, (n,) int64 in 0 … B − 1."""
        return torch.tensor(self.samples, device="cpu", dtype=torch.int64) - self.batch.start

    def random(self) -> np.ndarray:
        """Return a number in [0, 1) for each sample, (n,) float64."""
        return np.array([rng.random() for rng in self.rngs])

    def integers(self, stop: int) -> np.ndarray:
        """Return a whole number in 0 … stop − 1 for each sample, (n,) int64."""
        return np.array([rng.integers(stop) for rng in self.rngs])

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers (n, ...), a row for each sample, float32, on the CPU."""
        if shape[0] != len(self):
            raise ValueError(f"shape {shape}: expected a row for each of {len(self)} samples")
        drawn = [rng.standard_normal(shape[1:], dtype=np.float32) for rng in self.rngs]
        return torch.from_numpy(np.stack(drawn))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the pass of equally many values of each sample, (n, ...) → ().

        What a process returns is its own summand times the number of processes: the mean of the results over
        the processes is the mean over the pass, and so is that of their gradients.
        """
        share = len(self) * self.processes.size / self.passed
        return values.mean() * share

    def mean_of_some(self, values: Tensor, count: Tensor | int | None = None) -> Tensor:
        """Return the mean over the pass of values of which a share may have any number; see `mean`.

        Args:
            values: The values of this share, or with `count`, their sum among zeros.
            count: Number of values in this share; None for all of `values`. Default: None.

        Returns:
            The mean, (); NaN if there are no values in the pass.
        """
        own = torch.as_tensor(values.numel() if count is None else count, device=values.device)
        return values.sum() * self.processes.size / self.processes.total(own)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (n, ...) of all shares in order, (B, ...), with gradients.

        A loss that every process computes from them is its own mean over the processes; see `mean`.

        Raises:
            ValueError: If the pass is not the whole batch.
        """
        if self.passed < len(self.batch):
            raise ValueError("accumulate: expected 1, as this loss compares all samples of a batch")
        return self.processes.gather(
            values, [len(self.processes.share(self.batch, rank)) for rank in range(self.processes.size)]
        )


def _part(samples: range, k: int, n: int) -> range:
    return samples[len(samples) * k // n : len(samples) * (k + 1) // n]


def _restored(seed: int, samples: range, batch: range, stream: int, passed: int) -> Draws:
    return Draws(seed, samples, batch=batch, stream=stream, passed=passed)
