"""What the configurations of all trainings of adapters have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ldm.training.adapters.class_images import PriorPreservation
from ldm.training.config import RunConfig
from ldm.training.inputs.opening import DataSection
from ldm.training.tuning.base_model import check_base
from ldm.training.tuning.tuned_model import FineTuneDiffusion


@dataclass(frozen=True, kw_only=True)
class AdapterTraining:
    """The fields of every training of something small around a loaded model, whose weights stay.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        base: Name of the model (see `ldm.list_models`); None for that of the folder `weights`.
        weights: Its weights, as `ldm.load` takes them; None for the model's own. Default: None.
        diffusion: The weights of the loss; prediction and schedule stay the model's.

    Raises:
        ValueError: If no model is named, or the run or the diffusion is one that no adapter can express.
    """

    run: RunConfig
    data: DataSection
    base: str | None = None
    weights: str | None = None
    diffusion: FineTuneDiffusion = field(default_factory=FineTuneDiffusion)

    def __post_init__(self) -> None:
        check_base(self.base, self.weights)
        if self.run.distributed != "ddp":
            raise ValueError(f"run.distributed {self.run.distributed!r}: expected 'ddp', an adapter is small")
        for name in ("prediction", "zero_terminal_snr"):  # no card beside an adapter states another one
            if getattr(self.diffusion, name) is not None:
                raise ValueError(f"diffusion.{name}: expected none, an adapter cannot change it")

    @property
    def prior(self) -> PriorPreservation | None:
        """Images of the model itself that it keeps drawing: none, unless a training has them."""
        return None


@dataclass(frozen=True, kw_only=True)
class NetworkAdapterTraining(AdapterTraining):
    """An `AdapterTraining` whose gradients pass through large networks, and whose file is large.

    Args:
        dtype: Floating-point type of the file. Default: "float16".
        recompute: Whether blocks compute their activations again in the backward pass, which takes less
            memory and more time. Default: False.
    """

    dtype: Literal["float16", "float32"] = "float16"
    recompute: bool = False
