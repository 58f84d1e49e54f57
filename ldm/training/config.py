"""What every training run's configuration holds, whichever part it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ldm.data.mix import Mix


def at_least(low: float, **values: float) -> None:
    """Raise ValueError for the first value below ``low``."""
    for name, value in values.items():
        if not value >= low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")


def share(**values: float) -> None:
    """Raise ValueError for the first value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}: expected a share in [0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; the learning rate rises linearly over ``warmup`` steps, stays, falls to ``final`` of itself over
    the last ``decay`` steps."""

    lr: float
    warmup: int = 500
    decay: int = 0
    final: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        at_least(
            0,
            lr=self.lr,
            warmup=self.warmup,
            decay=self.decay,
            final=self.final,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected numbers in [0, 1), got {self.betas}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0 … steps − 1."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        left = steps - step
        fall = 1.0 if left >= self.decay else self.final + (1 - self.final) * left / self.decay
        return self.lr * rise * fall


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, at which size, composed in which shares: by ``mix`` in what is computed once, by
    ``drawn`` in training (None: ``mix``)."""

    folder: str = "data/emoji"
    size: int = 128
    mix: Mix = field(default_factory=Mix)
    drawn: Mix | None = None

    def __post_init__(self) -> None:
        at_least(8, size=self.size)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run goes: its length, its batches, its optimiser, and how often it reports, samples and saves."""

    name: str
    seed: int = 0
    steps: int
    batch: int
    optimizer: OptimizerConfig
    ema: float = 0.999
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every: int = 20
    validate_every: int = 1000
    sample_every: int = 1000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        at_least(
            1,
            steps=self.steps,
            batch=self.batch,
            log_every=self.log_every,
            validate_every=self.validate_every,
        )
        at_least(1, sample_every=self.sample_every, checkpoint_every=self.checkpoint_every)
        at_least(0, seed=self.seed)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name: expected a plain folder name, got {self.name!r}")
