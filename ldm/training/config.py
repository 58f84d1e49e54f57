"""The configuration that all training runs share, whichever network they train."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ldm.data.mix import Mix
from ldm.training.power_averages import WIDEST

Split = Literal["ddp", "fsdp"]  # what each of several processes holds: the model, or a part of each weight


def check_at_least(low: float, **values: float) -> None:
    """Raise ValueError for the first value below `low`."""
    for name, value in values.items():
        if not value >= low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")


def check_fraction(**values: float) -> None:
    """Raise ValueError for the first value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}: expected a share in [0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer and its learning rate schedule: linear warm-up, constant, decay.

    Args:
        kind: "adamw", or "muon": Muon for hidden matrices with AdamW for the rest, see
            `ldm.training.optimizers`. Default: "adamw".
        lr: The highest learning rate.
        warmup: Steps over which the rate rises from 0. Default: 500.
        decay: Last steps over which the rate falls. Default: 0.
        shape: How the rate falls: "linear", or "cosine", half a period. Default: "linear".
        final: Where the rate ends, as a fraction of `lr`. Default: 0.
        betas: AdamW's decay rates of the moments. Default: (0.9, 0.99).
        weight_decay: Weight decay, as a multiple of the learning rate. Default: 0.01.
        clip: The largest norm of the gradient; 0 disables clipping. Default: 1.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float
    warmup: int = 500
    decay: int = 0
    shape: Literal["linear", "cosine"] = "linear"
    final: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(
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
        """Return the learning rate of a step in 0 … steps − 1."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        left = steps - step
        if left >= self.decay:
            return self.lr * rise
        share = left / self.decay
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.lr * rise * (self.final + (1 - self.final) * share)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The emoji data set, and the scenes that are drawn of it.

    Args:
        kind: "emoji". Default: "emoji".
        folder: Folder of the data set. Default: "data/emoji".
        size: Side of the rendered images in pixels, at least 8. Default: 128.
        mix: Probabilities of scenes; the caches hold what this mix can draw.
        drawn: Probabilities by which training draws from the caches; None for `mix`. Default: None.
    """

    kind: Literal["emoji"] = "emoji"
    folder: str = "data/emoji"
    size: int = 128
    mix: Mix = field(default_factory=Mix)
    drawn: Mix | None = None

    def __post_init__(self) -> None:
        check_at_least(8, size=self.size)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, batches, optimizer and reports of a run.

    Args:
        name: Name of the run's folder.
        seed: Seed of weights and draws, at least 0. Default: 0.
        steps: Number of optimizer steps.
        batch: Samples per step, of all processes together.
        accumulate: Number of forward and backward passes of a step, each with a part of the batch, which
            takes less memory and gives the same gradient up to rounding. Default: 1.
        optimizer: AdamW and its learning rate.
        ema: Decay of the moving average of the weights, in [0, 1). Default: 0.999.
        ema_on_cpu: Whether averages are kept on the CPU, wherever the model is. Default: False.
        widths: Widths of averages from which `ldm export --width` computes any other; two are enough, such as
            0.05 and 0.1. Default: none.
        widths_every: Steps between the files of these averages, each of which has the size of the weights in
            half precision for each width. Default: 1000.
        precision: Autocast dtype; "auto" is bfloat16 where the hardware multiplies it, else float32.
            Default: "auto".
        distributed: What each of several processes holds (see `ldm.training.distributed`): "ddp", the whole
            model, or "fsdp", a part of each weight. Default: "ddp".
        log_every: Steps between lines of ``metrics.jsonl``. Default: 20.
        validate_every: Steps between validations. Default: 1000.
        sample_every: Steps between sample images, which are made at validations only. Default: 1000.
        checkpoint_every: Steps between checkpoints. Default: 500.
    """

    name: str
    seed: int = 0
    steps: int
    batch: int
    accumulate: int = 1
    optimizer: OptimizerConfig
    ema: float = 0.999
    ema_on_cpu: bool = False
    widths: tuple[float, ...] = ()
    widths_every: int = 1000
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    distributed: Split = "ddp"
    log_every: int = 20
    validate_every: int = 1000
    sample_every: int = 1000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        check_at_least(
            1,
            steps=self.steps,
            batch=self.batch,
            accumulate=self.accumulate,
            widths_every=self.widths_every,
            log_every=self.log_every,
            validate_every=self.validate_every,
            sample_every=self.sample_every,
            checkpoint_every=self.checkpoint_every,
        )
        check_at_least(0, seed=self.seed)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")
        if self.ema_on_cpu and self.distributed == "fsdp":
            raise ValueError("ema_on_cpu: expected false with distributed 'fsdp', which splits averages too")
        if len(set(self.widths)) < len(self.widths) or not all(0 < width < WIDEST for width in self.widths):
            raise ValueError(
                f"widths: expected different numbers between 0 and {WIDEST:.4f}, got {list(self.widths)}"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name: expected a plain folder name, got {self.name!r}")
